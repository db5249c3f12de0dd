"""timm's ``Beit``: BEiT and BEiTv2, whose attention adds a bias by how far apart two patches are.

Each block has a table of them, and in some models all blocks share one more. Kept tokens bring their coordinates along.
At a coarser grid the tables are resampled as timm's ``set_input_size`` does it.
"""

from typing import NamedTuple

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.derived import derived
from tinydrop_kernels.families import blocks, costs, embedding, pools
from tinydrop_kernels.families.blocks import project_fused
from tinydrop_kernels.families.checks import foreign_block, foreign_method, passed_over
from tinydrop_kernels.families.pools import pool_segments, unsupported_pool
from tinydrop_kernels.ops.tracing import eager
from tinydrop_kernels.ops.types import Grid, Packed, Part, RelativeBias, TimmModule

NAME = "Beit (BEiT, BEiTv2)"
READS_POSITIONS = True
attentions = blocks.attentions
check_images = embedding.check_images
grid_size = embedding.grid_size
num_prefix_tokens = embedding.num_prefix_tokens
levels = embedding.levels
patch_size = embedding.patch_size
settings = pools.settings
dense_classify = pools.dense_classify
flops = costs.packed_flops
dense_flops = costs.dense_flops
_METHODS = ("forward", "forward_features", "forward_head")
_ATTENTIONS: dict[type, set[str]] = {Attention: {"qkv", "attn_drop", "proj", "proj_drop"}}


class Placed(NamedTuple):
    """Where the packed tokens are; travels through timm's blocks in the place of ``shared_rel_pos_bias``."""

    packed: Packed
    parts: list[Part]
    tables: list[Tensor | None]  # the block's, at the grid of each part


def accepts(model: nn.Module) -> bool:
    """See :class:`base.Family`."""
    return isinstance(model, Beit)


def unsupported_reason(model: TimmModule) -> str | None:
    """See :class:`base.Family`."""
    return (
        foreign_method(model, Beit, _METHODS)
        or unsupported_pool(model, ("token", "avg"))
        or foreign_block(model, (Block,), _ATTENTIONS)
        or passed_over(model)
    )


def attend(attention: TimmModule, x: Tensor, shared_rel_pos_bias: Tensor | Placed | None = None) -> Tensor:
    """``Attention.forward``, on packed tokens ``(total, dim)`` when told where they are."""
    if not isinstance(shared_rel_pos_bias, Placed):
        dense: Tensor = type(attention).forward(attention, x, shared_rel_pos_bias=shared_rel_pos_bias)
        return dense
    packed, parts, tables = shared_rel_pos_bias
    projected, out, end = project_fused(attention, x), [], 0
    for part, table in zip(parts, tables, strict=True):
        own = slice(end, end := end + part.total)
        lengths = (part.cu_seqlens, part.cu_seqlens, packed.max_seqlen, packed.max_seqlen)
        bias, positions = None, packed.positions
        if table is not None and positions is not None:
            bias = RelativeBias(table, positions[own], part.grid)
        query, key, value = (t[own] for t in projected)
        out.append(ops.varlen_attention(query, key, value, *lengths, bias=bias))
    projection: Tensor = attention.proj_drop(attention.proj(torch.cat(out).flatten(1)))
    return projection


@eager  # they are kept between calls, and made by what cannot be traced
def _tables(model: TimmModule, parts: list[Part]) -> list[list[Tensor | None]]:
    return [[_table(block.attn, model.rel_pos_bias, part.grid) for part in parts] for block in model.blocks]


def _table(attention: TimmModule, shared: TimmModule | None, grid: Grid) -> Tensor | None:
    """The block's table and the model's, summed, at a grid: ``(distances, heads)``."""
    owners = [m for m in (attention, shared) if m is not None and m.relative_position_bias_table is not None]
    tables = [_resampled(m.relative_position_bias_table, tuple(m.window_size), grid) for m in owners]
    return torch.stack(tables).sum(0) if tables else None


def _resampled(table: Tensor, old: Grid, new: Grid) -> Tensor:
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, table.shape[1])
    if new == old:
        return table
    resized: Tensor = derived(table, (old, new), lambda: resize_rel_pos_bias_table(table, new, shape, old))
    return resized


def trial_patches(model: TimmModule, grid: Grid) -> int:
    """See :class:`base.Family`."""
    return grid[0] * grid[1]


def embed(model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid) -> Tensor:
    """See :class:`base.Family`."""
    if not embedding.embeds_kept_only(model):
        return embedding.gather_kept(dense_embed(model, images), 1, indices, cu_seqlens, total)
    return embedding.embed_kept(model, images, indices, cu_seqlens, total, grid)


def encode(
    model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
) -> tuple[Tensor, Packed]:
    """See :class:`base.Family`."""
    for block, tables in zip(model.blocks, _tables(model, parts), strict=True):
        tokens = block(tokens, shared_rel_pos_bias=Placed(packed, parts, tables))
    return model.norm(tokens), packed


def classify(model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
    """See :class:`base.Family`."""
    logits: Tensor = model.head(model.head_drop(model.fc_norm(pool_segments(model, tokens, packed, 1))))
    return logits


def dense_embed(model: TimmModule, images: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    patches = model.patch_embed(images)
    tokens = torch.cat((model.cls_token.expand(len(patches), -1, -1), patches), dim=1)
    embedded: Tensor = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
    return embedded


def dense_encode(model: TimmModule, tokens: Tensor) -> Tensor:
    """See :class:`base.Family`."""
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
    for block in model.blocks:
        tokens = block(tokens, shared_rel_pos_bias=shared)
    encoded: Tensor = model.norm(tokens)
    return encoded
