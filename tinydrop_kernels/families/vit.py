"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled``: ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP, FlexiViT.

Read against timm 1.0.31. What is relied upon is checked in :func:`unsupported_reason`, by identity with timm's own
classes and methods, so that a model or a timm that does something else is refused and not mistaken.
"""

from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, PatchDropout, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.families import blocks
from tinydrop_kernels.families.blocks import has_hooks, is_attend, reads_prefix_alone, run_last_block
from tinydrop_kernels.families.grids import resampled_positions
from tinydrop_kernels.flops import count_flops, linear_flops
from tinydrop_kernels.ops.types import Packed, TimmModule

NAME = "VisionTransformer (ViT, DeiT, DeiT distilled, DeiT-3, DINOv2, CLIP and SigLIP towers, FlexiViT)"
POOLS = ("token", "avg", "max", "avgmax", "map")
attend = blocks.attend
_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_MAP_POOL_PARTS = {"q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"}


def accepts(model: nn.Module) -> bool:
    """See :class:`base.Family`."""
    return isinstance(model, VisionTransformer)


def unsupported_reason(model: TimmModule) -> str | None:
    """See :class:`base.Family`."""
    base = VisionTransformerDistilled if isinstance(model, VisionTransformerDistilled) else VisionTransformer
    for method in _METHODS:
        if getattr(type(model), method) is not getattr(base, method) or method in vars(model):
            return f"its {method} is not timm's"
    if model.global_pool not in POOLS:
        return f"global_pool={model.global_pool!r}; supported are {', '.join(POOLS)}"
    if type(model.patch_drop) not in (nn.Identity, PatchDropout):
        return f"patch_drop of type {type(model.patch_drop).__name__}; supported is timm's PatchDropout"
    for block in model.blocks:
        if type(block) not in (Block, ResPostBlock):
            return f"blocks of type {type(block).__name__}; supported are Block and ResPostBlock"
        if type(block.attn) is not Attention or "forward" in vars(block.attn):
            return f"attention of type {type(block.attn).__name__}; supported is timm.layers.Attention"
        unknown = {name for name, _ in block.attn.named_children()} - _ATTENTION_PARTS
        if unknown:
            return f"attention with {', '.join(sorted(unknown))}, which this version does not know"
    if model.global_pool == "map":
        pool = model.attn_pool
        unknown = {name for name, _ in pool.named_children()} - _MAP_POOL_PARTS
        if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None or pool.pool != "token" or unknown:
            return "an attention pool other than timm's AttentionPoolLatent as SigLIP has it"
    return _passed_over(model)


def find_change(model: TimmModule) -> str | None:
    """See :class:`base.Family`."""
    own = vars(model).keys() & set(_METHODS[1:])
    if own:
        return f"its {min(own)} was replaced"
    if model.global_pool not in POOLS:  # reset_classifier can change it
        return f"it has global_pool={model.global_pool!r} now, supported are {', '.join(POOLS)}"
    for block in model.blocks:
        if not is_attend(vars(block.attn).get("forward")):
            return "an attention was replaced"
    return _passed_over(model)


def _passed_over(model: TimmModule) -> str | None:
    """What timm would run and the packed forward does not: hooks on containers, a patch_drop, active dropout."""
    if type(model.patch_drop) not in (nn.Identity, PatchDropout) or has_hooks(model.patch_drop):
        return "a patch_drop that is more than timm's PatchDropout"
    if has_hooks(model.blocks):
        return "hooks on blocks, whose modules are called one by one"
    if model.attn_pool is not None and has_hooks(model.attn_pool):
        return "hooks on attn_pool, whose parts are called one by one"
    if not model.training:
        dropouts = [model.pos_drop, model.patch_drop, *(block.attn.attn_drop for block in model.blocks)]
        if any(d.training and (getattr(d, "p", 0) or getattr(d, "prob", 0)) for d in dropouts):
            return "dropout in train mode, though the model is in eval mode"
    return None


def attentions(model: TimmModule) -> list[nn.Module]:
    """See :class:`base.Family`."""
    return [block.attn for block in model.blocks]


def check_images(model: TimmModule, images: Tensor) -> None:
    """See :class:`base.Family`."""
    height, width = images.shape[-2:]
    patch = model.patch_embed
    if model.dynamic_img_size:
        rows, columns = patch.feat_ratio(as_scalar=False)
        whole = patch.dynamic_img_pad or not (height % rows or width % columns)
        if not (height and width and whole):
            raise ValueError(f"images: got {height} x {width}, expected multiples of the patch {rows} x {columns}")
    elif (height, width) != tuple(patch.img_size):
        raise ValueError(f"images: got {height} x {width}, expected {patch.img_size[0]} x {patch.img_size[1]}")


def grid_size(model: TimmModule, images: Tensor) -> tuple[int, int]:
    """See :class:`base.Family`."""
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return rows, columns


def patch_size(model: TimmModule) -> tuple[int, int] | None:
    """See :class:`base.Family`."""
    if not embeds_kept_only(model):
        return None
    height, width = model.patch_embed.proj.weight.shape[-2:]
    return height, width


def embeds_kept_only(model: TimmModule) -> bool:
    """Whether the patch embedding is a plain projection, so that dropped patches need not go through it."""
    patch_embed = model.patch_embed
    if type(patch_embed) is not PatchEmbed or patch_embed.dynamic_img_pad:
        return False
    projection, norm = patch_embed.proj, patch_embed.norm
    plain = type(projection) is nn.Conv2d and type(norm) is nn.Identity
    return plain and not any(map(has_hooks, (patch_embed, projection, norm)))


def embed(
    model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: tuple[int, int]
) -> Tensor:
    """See :class:`base.Family`."""
    if embeds_kept_only(model):
        projection = model.patch_embed.proj
        prefix, pos_embed = _prefix_and_positions(model, grid)
        images, weight, bias, prefix, pos_embed = _autocast(
            images, projection.weight, projection.bias, prefix, pos_embed
        )
        tokens = ops.embed_tokens(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total)
        tokens = tokens.to(projection.weight.dtype)
    else:
        embedded = model._pos_embed(model.patch_embed(images))
        prefix, patches = embedded.split([model.num_prefix_tokens, grid[0] * grid[1]], dim=1)
        tokens = ops.gather_tokens(patches, prefix, indices, cu_seqlens, total)
    normed: Tensor = model.norm_pre(tokens)
    return normed


def _autocast(*tensors: Tensor | None) -> Any:
    """The tensors as autocast would hand them to a convolution: it does not reach into a registered operator."""
    device_type = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _prefix_and_positions(model: TimmModule, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens with their positions ``(num_prefix_tokens, dim)`` and the patches' positions ``(patches, dim)``."""
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    rows = [token[0] for token in tokens if token is not None]
    prefix = torch.cat(rows) if rows else model.patch_embed.proj.weight.new_empty(0, model.embed_dim)
    if model.pos_embed is None:
        return prefix, None
    own = 0 if model.no_embed_class else model.num_prefix_tokens
    pos_embed = resampled_positions(model.pos_embed, tuple(model.patch_embed.grid_size), grid, own)
    return (prefix + pos_embed[0, :own] if own else prefix), pos_embed[0, own:]


def encode(model: TimmModule, tokens: Tensor, packed: Packed) -> tuple[Tensor, Packed]:
    """See :class:`base.Family`. Where the head reads prefix tokens alone, so does the last block."""
    *blocks, last = model.blocks
    for block in blocks:
        tokens = block(tokens, attn_mask=packed)
    if model.global_pool == "token" and reads_prefix_alone(last):
        tokens, packed = run_last_block(last, tokens, packed, model.num_prefix_tokens)
    else:
        tokens = last(tokens, attn_mask=packed)
    return model.norm(tokens), packed


def classify(model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
    """See :class:`base.Family`."""
    starts = packed.cu_seqlens
    logits: Tensor
    if model.global_pool == "token":  # the class token, and where there is one the distillation token behind it
        read = 2 if isinstance(model, VisionTransformerDistilled) else 1
        rows = [ops.segment_pool(tokens, starts, "first", skip=i) for i in range(read)]
        logits = model.forward_head(torch.stack(rows, dim=1))
        return logits
    skip = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.global_pool == "map":
        pooled = _map_pool(model.attn_pool, tokens, packed, skip)
    else:
        modes = {"avg": ["mean"], "max": ["max"], "avgmax": ["mean", "max"]}[model.global_pool]
        pooled = torch.stack([ops.segment_pool(tokens, starts, mode, skip) for mode in modes]).mean(dim=0)
    logits = model.head(model.head_drop(model.fc_norm(pooled)))
    return logits


def _map_pool(pool: TimmModule, tokens: Tensor, packed: Packed, skip: int) -> Tensor:
    """``AttentionPoolLatent.forward`` on segments: the latent queries attend each image's tokens but the first ones."""
    segments, latents = len(packed.cu_seqlens) - 1, pool.latent_len
    query = pool.q(pool.latent[0]).view(latents, pool.num_heads, pool.head_dim)
    key, value = pool.kv(tokens).view(-1, 2, pool.num_heads, pool.head_dim).unbind(1)
    query, key = pool.q_norm(query), pool.k_norm(key).to(value.dtype)
    starts_q = torch.arange(0, (segments + 1) * latents, latents, dtype=torch.int32, device=tokens.device)
    query = query.expand(segments, -1, -1, -1).flatten(0, 1).to(value.dtype)
    lengths = (starts_q, packed.cu_seqlens, latents, packed.max_seqlen)
    x = ops.varlen_attention(query, key, value, *lengths, pool.scale, skip_keys=skip)
    x = pool.proj_drop(pool.proj(x.flatten(1)))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    pooled: Tensor = x[::latents]
    return pooled


def dense_embed(model: TimmModule, images: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    embedded: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    return embedded


def dense_encode(model: TimmModule, tokens: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    encoded: Tensor = model.norm(model.blocks(tokens))
    return encoded


def dense_classify(model: TimmModule, tokens: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    logits: Tensor = model.forward_head(tokens)
    return logits


def flops(model: TimmModule, counts: list[int], grid: tuple[int, int]) -> int:
    """See :class:`base.Family`."""
    return _flops(model, counts, grid, is_packed=True)


def dense_flops(model: TimmModule, images: int, grid: tuple[int, int]) -> int:
    """See :class:`base.Family`."""
    return images * _flops(model, [grid[0] * grid[1]], grid, is_packed=False)


def _flops(model: TimmModule, counts: list[int], grid: tuple[int, int], is_packed: bool) -> int:
    pool, prefix, last = model.attn_pool, model.num_prefix_tokens, model.blocks[-1]
    per_token = sum(linear_flops(m) for m in model.blocks.modules())
    per_pair = sum(4 * block.attn.attn_dim for block in model.blocks)
    per_image = linear_flops(model.head) + linear_flops(getattr(model, "head_dist", None))
    is_plain = embeds_kept_only(model)
    if not is_plain:
        height, width = model.patch_embed.feat_ratio(as_scalar=False)
        per_image += count_flops(model.patch_embed, (model.in_chans, grid[0] * height, grid[1] * width))
    spared = 0  # of each patch in a last block that computes keys and values of patches alone
    if is_packed and model.global_pool == "token" and reads_prefix_alone(last):
        spared = sum(linear_flops(m) for m in last.modules()) - linear_flops(last.attn.qkv) * 2 // 3
    total = 0
    for patches in filter(None, counts):
        tokens = prefix + patches
        total += tokens * per_token + tokens**2 * per_pair + per_image
        if spared:
            total -= patches * (spared + tokens * 4 * last.attn.attn_dim)
        if pool is not None:
            pooled = tokens if model.pool_include_prefix else patches
            once = sum(linear_flops(m) for name, m in pool.named_modules() if name != "kv") * pool.latent_len
            total += pooled * 4 * pool.latent_len * pool.num_heads * pool.head_dim + once
            total += (tokens if is_packed else pooled) * linear_flops(pool.kv)
        if is_plain:
            total += patches * 2 * model.patch_embed.proj.weight.numel()
    return total
