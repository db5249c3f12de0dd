"""timm's ``Eva``: EVA, EVA-02, DINOv3, PE, and ViTs with rotary embeddings, axial or mixed."""

from functools import partial
from typing import Any

from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from tinydrop_kernels.families import blocks, costs, embedding, pools
from tinydrop_kernels.families.blocks import attend_projected, project_fused
from tinydrop_kernels.families.checks import foreign_block, foreign_method, passed_over
from tinydrop_kernels.families.pools import pool_segments, unsupported_pool
from tinydrop_kernels.families.rotary import PackedRope, embedding_at
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule

NAME = "Eva (EVA, EVA-02, DINOv3, PE, ViTs with rotary embeddings)"
READS_POSITIONS = True
attentions = blocks.attentions
check_images = embedding.check_images
grid_size = embedding.grid_size
num_prefix_tokens = embedding.num_prefix_tokens
levels = embedding.levels
patch_size = embedding.patch_size
settings = pools.settings
trial_patches = embedding.few_patches
dense_classify = pools.dense_classify
flops = costs.packed_flops
dense_flops = costs.dense_flops
_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
_PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
_ATTENTIONS: dict[type, set[str]] = {EvaAttention: _PARTS, AttentionRope: _PARTS}


def accepts(model: nn.Module) -> bool:
    """See :class:`base.Family`."""
    return isinstance(model, Eva)


def unsupported_reason(model: TimmModule) -> str | None:
    """See :class:`base.Family`."""
    return (
        foreign_method(model, Eva, _METHODS)
        or unsupported_pool(model)
        or foreign_block(model, (EvaBlock, EvaBlockPostNorm), _ATTENTIONS)
        or passed_over(model)
    )


def attend(
    attention: TimmModule, x: Tensor, rope: Tensor | None = None, attn_mask: Any = None, is_causal: bool = False
) -> Tensor:
    """``EvaAttention.forward`` and ``AttentionRope.forward``, on packed tokens ``(total, dim)`` when handed a layout.

    ``rope`` is then ``(total, 1 or heads, 2 * head_dim)``, sines before cosines.
    """
    if not isinstance(attn_mask, Packed):
        masks = {"attn_mask": attn_mask, "is_causal": is_causal}
        dense: Tensor = type(attention).forward(attention, x, rope=rope, **masks)
        return dense
    if attention.qkv is None:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (project(x).view(len(x), -1, attention.head_dim) for project in projections)
    elif isinstance(attention, EvaAttention):
        query, key, value = project_fused(attention, x)
    else:
        query, key, value = attention.qkv(x).view(len(x), 3, attention.num_heads, attention.head_dim).unbind(1)
    turn = None if rope is None else partial(apply_rot_embed_cat, emb=rope, half=attention.rotate_half)
    return attend_projected(attention, x, query, key, value, attn_mask, attn_mask, turn)


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
    """See :class:`base.Family`."""
    rope = PackedRope(model.rope, model.rope_mixed, packed, parts)
    for i, block in enumerate(model.blocks):
        tokens = block(tokens, rope=rope.of_block(i), attn_mask=packed)
    return model.norm(tokens), packed


def classify(model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
    """See :class:`base.Family`."""
    skip = 0 if model.global_pool == "map" else model.num_prefix_tokens
    logits: Tensor = model.head(model.head_drop(model.fc_norm(pool_segments(model, tokens, packed, skip))))
    return logits


def dense_embed(model: TimmModule, images: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    embedded: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images))[0])
    return embedded


def dense_encode(model: TimmModule, tokens: Tensor) -> Tensor:
    """See :class:`base.Family`. Of fewer tokens than the grid has, the first patches'."""
    rope, patches = None, tokens.shape[1] - model.num_prefix_tokens
    if model.rope is not None:
        rope = embedding_at(model.rope, tuple(model.patch_embed.grid_size))[..., :patches, :]
    for i, block in enumerate(model.blocks):
        tokens = block(tokens, rope=rope[i] if rope is not None and model.rope_mixed else rope)
    encoded: Tensor = model.norm(tokens)
    return encoded
