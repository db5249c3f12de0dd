"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled``: ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP, FlexiViT.

Read against timm 1.0.31. What is relied upon is checked in :func:`unsupported_reason`, by identity with timm's own
classes and methods, so that a model or a timm that does something else is refused and not mistaken.
"""

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.families import blocks, embedding, pools
from tinydrop_kernels.families.blocks import reads_prefix_alone, run_last_block
from tinydrop_kernels.families.checks import foreign_block, foreign_method, passed_over
from tinydrop_kernels.families.costs import flops_of
from tinydrop_kernels.families.pools import pool_segments, unsupported_pool
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule

NAME = "VisionTransformer (ViT, DeiT, DeiT distilled, DeiT-3, DINOv2, CLIP and SigLIP towers, FlexiViT)"
READS_POSITIONS = False
attend = blocks.attend
attentions = blocks.attentions
check_images = embedding.check_images
grid_size = embedding.grid_size
num_prefix_tokens = embedding.num_prefix_tokens
levels = embedding.levels
patch_size = embedding.patch_size
settings = pools.settings
trial_patches = embedding.few_patches
dense_classify = pools.dense_classify
_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_ATTENTIONS: dict[type, set[str]] = {
    Attention: {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
}


def accepts(model: nn.Module) -> bool:
    """See :class:`base.Family`."""
    return isinstance(model, VisionTransformer)


def unsupported_reason(model: TimmModule) -> str | None:
    """See :class:`base.Family`."""
    base = VisionTransformerDistilled if isinstance(model, VisionTransformerDistilled) else VisionTransformer
    return (
        foreign_method(model, base, _METHODS)
        or unsupported_pool(model)
        or foreign_block(model, (Block, ResPostBlock), _ATTENTIONS)
        or passed_over(model)
    )


def embed(model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid) -> Tensor:
    """See :class:`base.Family`."""
    if not embedding.embeds_kept_only(model):
        tokens = dense_embed(model, images)
        return embedding.gather_kept(tokens, model.num_prefix_tokens, indices, cu_seqlens, total)
    normed: Tensor = model.norm_pre(embedding.embed_kept(model, images, indices, cu_seqlens, total, grid))
    return normed


def encode(
    model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
) -> tuple[Tensor, Packed]:
    """See :class:`base.Family`. Where the head reads prefix tokens alone, so does the last block."""
    *blocks, last = model.blocks
    for block in blocks:
        tokens = block(tokens, attn_mask=packed)
    if model.global_pool == "token" and reads_prefix_alone(last) and not read_all:
        tokens, packed = run_last_block(last, tokens, packed, model.num_prefix_tokens)
    else:
        tokens = last(tokens, attn_mask=packed)
    return model.norm(tokens), packed


def classify(model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
    """See :class:`base.Family`."""
    logits: Tensor
    if model.global_pool == "token":  # the class token, and where there is one the distillation token behind it
        read = 2 if isinstance(model, VisionTransformerDistilled) else 1
        rows = [ops.segment_pool(tokens, packed.cu_seqlens, "first", skip=i) for i in range(read)]
        logits = model.forward_head(torch.stack(rows, dim=1))
        return logits
    pooled = pool_segments(model, tokens, packed, _pool_skip(model))
    logits = model.head(model.head_drop(model.fc_norm(pooled)))
    return logits


def dense_embed(model: TimmModule, images: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    embedded: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    return embedded


def dense_encode(model: TimmModule, tokens: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    encoded: Tensor = model.norm(model.blocks(tokens))
    return encoded


def flops(model: TimmModule, counts: list[int], grid: Grid) -> int:
    """See :class:`base.Family`."""
    last_reads_prefix = model.global_pool == "token" and reads_prefix_alone(model.blocks[-1])
    return flops_of(model, counts, grid, True, _pool_skip(model), last_reads_prefix)


def dense_flops(model: TimmModule, images: int, grid: Grid) -> int:
    """See :class:`base.Family`."""
    return images * flops_of(model, [grid[0] * grid[1]], grid, False, _pool_skip(model))


def _pool_skip(model: TimmModule) -> int:
    skip: int = 0 if model.pool_include_prefix else model.num_prefix_tokens
    return skip
