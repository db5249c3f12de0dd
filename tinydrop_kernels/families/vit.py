"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled``: ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP, FlexiViT.

Read against timm 1.0.31. What is relied upon is checked in :func:`refusal`, by identity with timm's own classes and
methods, so that a model or a timm that does something else is refused and not mistaken.
"""

from typing import Any

import torch
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.aliases import TimmModule
from tinydrop_kernels.ragged import RaggedLayout

NAME = "VisionTransformer (ViT, DeiT, DeiT distilled, DeiT-3, DINOv2, CLIP and SigLIP towers, FlexiViT)"
POOLS = ("token", "avg", "max", "avgmax", "map")
_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_ATTENTION_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_MAP_POOL_PARTS = {"q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"}


def accepts(model: nn.Module) -> bool:
    """Whether the model is of this family at all; :func:`refusal` says whether every part of it is supported."""
    return isinstance(model, VisionTransformer)


def refusal(model: TimmModule) -> str | None:
    """Why the model cannot be patched, or None."""
    base = VisionTransformerDistilled if isinstance(model, VisionTransformerDistilled) else VisionTransformer
    for method in _METHODS:
        if getattr(type(model), method) is not getattr(base, method) or method in vars(model):
            return f"its {method} is not timm's"
    if model.global_pool not in POOLS:
        return f"global_pool={model.global_pool!r}; supported are {', '.join(POOLS)}"
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
    return None


def attentions(model: TimmModule) -> list[nn.Module]:
    """The modules that must know about segments; :func:`attend` stands in for their forward."""
    return [block.attn for block in model.blocks]


def attend(attention: TimmModule, x: Tensor, attn_mask=None, is_causal: bool = False) -> Tensor:
    """``Attention.forward`` on packed tokens ``(total, dim)`` when handed a layout; timm's own otherwise."""
    if not isinstance(attn_mask, RaggedLayout):
        return type(attention).forward(attention, x, attn_mask=attn_mask, is_causal=is_causal)
    layout = attn_mask
    qkv = attention.qkv(x).view(-1, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.unbind(1)
    # autocast norms in float32
    query, key = attention.q_norm(query).to(value.dtype), attention.k_norm(key).to(value.dtype)
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    out = ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, longest, longest, attention.scale)
    out = attention.norm(out.flatten(1))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def check_images(model: TimmModule, images: Tensor) -> None:
    """Raise ValueError where the model would refuse the size of the images."""
    if model.global_pool not in POOLS:  # reset_classifier can change it after patching
        raise ValueError(f"model: it has global_pool={model.global_pool!r} now, supported are {', '.join(POOLS)}")
    height, width = images.shape[-2:]
    patch = model.patch_embed
    if model.dynamic_img_size:
        rows, columns = patch.feat_ratio(as_scalar=False)
        whole = patch.dynamic_img_pad or not (height % rows or width % columns)
        if not (height and width and whole):
            raise ValueError(f"images: got {height} x {width}, accepted are multiples of the patch {rows} x {columns}")
    elif (height, width) != tuple(patch.img_size):
        raise ValueError(f"images: got {height} x {width}, accepted is {patch.img_size[0]} x {patch.img_size[1]}")


def grid_size(model: TimmModule, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the patch grid of these images."""
    return tuple(model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:])))


def differs(model: TimmModule) -> str | None:
    """Which stage of a patched model is not timm's when everything is kept, or None: tried on noise.

    Catches what no list of supported parts can: a projection that is more than its weight, hooks that change what they
    see, norms and MLPs that mix tokens, a timm that works otherwise. The embedding is tried on one image, the blocks
    and the head on two sequences of a few tokens, so the trial costs little more than reading the weights once.
    """
    parameter = next(model.parameters())
    noise = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(parameter.device, parameter.dtype)

    def same(out: Tensor, wanted: Tensor) -> bool:
        bound = 1e-3 if parameter.dtype in (torch.float32, torch.float64) else 5e-2
        return out.shape == wanted.shape and bool((out - wanted).abs().max() <= bound * wanted.abs().max())

    image = random(1, model.in_chans, *model.patch_embed.img_size)
    grid = grid_size(model, image)
    num_patches, prefix = grid[0] * grid[1], model.num_prefix_tokens
    counts = torch.tensor([num_patches], dtype=torch.int32, device=parameter.device)
    layout = RaggedLayout(*ops.pack(counts, num_patches, prefix, False))
    indices = torch.arange(num_patches, dtype=torch.int32, device=parameter.device)[None]
    wanted = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    if not same(embed(model, image, indices, layout, grid, False), wanted[0]):
        return "a patch embedding that is not what its weights say"

    sequences, length = 2, prefix + 3
    tokens = random(sequences, length, wanted.shape[2])
    counts = torch.full((sequences,), 3, dtype=torch.int32, device=parameter.device)
    layout = RaggedLayout(*ops.pack(counts, 3, prefix, False))
    if not same(encode(model, tokens.flatten(0, 1), layout), model.norm(model.blocks(tokens)).flatten(0, 1)):
        return "blocks that are not timm's, or that mix tokens elsewhere than in attention"
    if not same(classify(model, tokens.flatten(0, 1), layout), model.forward_head(tokens)):
        return "a pool or head that is not timm's"
    return None


def embed(
    model: TimmModule,
    images: Tensor,
    indices: Tensor,
    layout: RaggedLayout,
    grid: tuple[int, int],
    summary: bool,
) -> Tensor:
    """Packed tokens ``(total, dim)`` as they enter the first block."""
    where = (indices, layout.cu_seqlens, layout.total, summary)
    if embeds_kept_only(model):
        projection = model.patch_embed.proj
        parts = (images, projection.weight, projection.bias, *_prefix_and_positions(model, grid))
        images, weight, bias, prefix, pos_embed = _autocast(parts, images.device.type)
        tokens = ops.embed_tokens(images, weight, bias, prefix, pos_embed, *where).to(projection.weight.dtype)
    else:
        embedded = model._pos_embed(model.patch_embed(images))
        prefix, patches = embedded.split([model.num_prefix_tokens, grid[0] * grid[1]], dim=1)
        tokens = ops.gather_tokens(patches, prefix, None, *where)
    return model.norm_pre(tokens)


def _autocast(tensors: tuple, device_type: str) -> Any:
    """The tensors as autocast would hand them to a convolution: it does not reach into a registered operator."""
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def embeds_kept_only(model: TimmModule) -> bool:
    """Whether the patch embedding is a plain projection, so that dropped patches need not go through it."""
    patch_embed = model.patch_embed
    plain = type(patch_embed) is PatchEmbed and isinstance(patch_embed.norm, nn.Identity)
    return plain and not patch_embed.dynamic_img_pad


def _prefix_and_positions(model: TimmModule, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens with their positions ``(num_prefix_tokens, dim)`` and the patches' positions ``(T, dim)``."""
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    rows = [token[0] for token in tokens if token is not None]
    prefix = torch.cat(rows) if rows else model.patch_embed.proj.weight.new_empty(0, model.embed_dim)
    if model.pos_embed is None:
        return prefix, None
    own = 0 if model.no_embed_class else model.num_prefix_tokens
    pos_embed = model.pos_embed
    if model.dynamic_img_size:
        pos_embed = resample_abs_pos_embed(
            pos_embed, new_size=list(grid), old_size=list(model.patch_embed.grid_size), num_prefix_tokens=own
        )
    return (prefix + pos_embed[0, :own] if own else prefix), pos_embed[0, own:]


def encode(model: TimmModule, tokens: Tensor, layout: RaggedLayout) -> Tensor:
    """The blocks and the final norm: ``(total, dim)`` to ``(total, dim)``."""
    for block in model.blocks:
        tokens = block(tokens, attn_mask=layout)
    return model.norm(tokens)


def classify(model: TimmModule, tokens: Tensor, layout: RaggedLayout) -> Tensor:
    """Pool and head: ``(batch, num_classes)``; the rows of empty segments mean nothing."""
    cu_seqlens = layout.cu_seqlens
    if model.global_pool == "token":  # the class token, and where there is one the distillation token behind it
        read = 2 if isinstance(model, VisionTransformerDistilled) else 1
        rows = [ops.segment_pool(tokens, cu_seqlens, "first", skip=i) for i in range(read)]
        return model.forward_head(torch.stack(rows, dim=1))
    skip = 0 if model.pool_include_prefix else model.num_prefix_tokens
    if model.global_pool == "map":
        pooled = _map_pool(model.attn_pool, tokens, layout, skip)
    else:
        modes = {"avg": ["mean"], "max": ["max"], "avgmax": ["mean", "max"]}[model.global_pool]
        pooled = torch.stack([ops.segment_pool(tokens, cu_seqlens, mode, skip) for mode in modes]).mean(dim=0)
    return model.head(model.head_drop(model.fc_norm(pooled)))


def _map_pool(pool: TimmModule, tokens: Tensor, layout: RaggedLayout, skip: int) -> Tensor:
    """``AttentionPoolLatent.forward`` on segments: the latent queries attend each image's tokens."""
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    if skip:
        tokens, cu_seqlens, longest = _without_prefix(tokens, layout, skip)
    batch, latents = len(cu_seqlens) - 1, pool.latent_len
    query = pool.q(pool.latent[0]).view(latents, pool.num_heads, pool.head_dim)
    key, value = pool.kv(tokens).view(-1, 2, pool.num_heads, pool.head_dim).unbind(1)
    query, key = pool.q_norm(query), pool.k_norm(key).to(value.dtype)
    cu_seqlens_q = torch.arange(0, (batch + 1) * latents, latents, dtype=torch.int32, device=tokens.device)
    query = query.expand(batch, -1, -1, -1).flatten(0, 1).to(value.dtype)
    x = ops.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens, latents, longest, pool.scale)
    x = pool.proj_drop(pool.proj(x.flatten(1)))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    return x[::latents]


def _without_prefix(tokens: Tensor, layout: RaggedLayout, skip: int) -> tuple[Tensor, Tensor, int]:
    """Each segment less its first rows, all moved up; how many rows are left behind the last is not read back."""
    position = torch.arange(layout.total, device=tokens.device)
    segment = torch.searchsorted(layout.cu_seqlens[1:], position, right=True)
    patches = position - layout.cu_seqlens[segment] >= skip
    stays = (layout.cu_seqlens.diff() > 0).int()
    cu_seqlens = layout.cu_seqlens.clone()
    cu_seqlens[1:] -= skip * stays.cumsum(0, dtype=torch.int32)
    patches_first = (~patches).byte().argsort(stable=True)
    return tokens[patches_first], cu_seqlens, layout.max_seqlen - skip
