"""timm's ``Beit``: BEiT and BEiTv2, whose attention adds a bias that depends on the distance of two patches.

Each block has a table of these biases, and in some models all blocks share another table. Kept tokens carry their
positions, so that their biases can be looked up. At a coarser grid the tables are resampled as timm's
``set_input_size`` does it.
"""

from types import MappingProxyType
from typing import NamedTuple

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Attention, Block
from timm.models.beit import Beit as TimmBeit
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.families.blocks import project_fused
from tinydrop_kernels.families.plain import PlainFamily
from tinydrop_kernels.families.pools import pool_segments
from tinydrop_kernels.ops.derived import derived
from tinydrop_kernels.ops.types import Grid, Packed, Part, RelativeBias, TimmModule
from tinydrop_kernels.torch_internals import eager


class PackedPositions(NamedTuple):
    """The layout of the packed tokens. timm's blocks pass it to their attention as ``shared_rel_pos_bias``."""

    packed: Packed
    parts: list[Part]
    tables: list[Tensor | None]  # the block's biases, one table per part at the part's grid


class Beit(PlainFamily):
    """Transformers whose attention adds a relative position bias."""

    name = "Beit (BEiT, BEiTv2)"
    reads_positions = True
    model_types = (TimmBeit,)
    methods = ("forward", "forward_features", "forward_head")
    block_types = (Block,)
    attention_types = MappingProxyType({Attention: {"qkv", "attn_drop", "proj", "proj_drop"}})
    pools = ("token", "avg")

    def attend(
        self, attention: TimmModule, x: Tensor, shared_rel_pos_bias: Tensor | PackedPositions | None = None
    ) -> Tensor:
        """Return the output of BEiT's ``Attention``.

        ``x`` holds packed tokens ``(total, dim)`` if ``shared_rel_pos_bias`` is a :class:`PackedPositions`. Otherwise
        timm's own forward runs.
        """
        if not isinstance(shared_rel_pos_bias, PackedPositions):
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

    def trial_patches(self, model: TimmModule, grid: Grid) -> int:
        return grid[0] * grid[1]  # timm's bias is sized for the whole grid, so its blocks take no fewer tokens

    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        for block, tables in zip(model.blocks, _tables(model, parts), strict=True):
            tokens = block(tokens, shared_rel_pos_bias=PackedPositions(packed, parts, tables))
        return model.norm(tokens), packed

    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        logits: Tensor = model.head(model.head_drop(model.fc_norm(pool_segments(model, tokens, packed, 1))))
        return logits

    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        patches = model.patch_embed(images)
        tokens = torch.cat((model.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        embedded: Tensor = model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)
        return embedded

    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
        for block in model.blocks:
            tokens = block(tokens, shared_rel_pos_bias=shared)
        encoded: Tensor = model.norm(tokens)
        return encoded


@eager  # the tables are kept between calls and resampled by timm's code, which torch.compile cannot trace
def _tables(model: TimmModule, parts: list[Part]) -> list[list[Tensor | None]]:
    return [[_table(block.attn, model.rel_pos_bias, part.grid) for part in parts] for block in model.blocks]


def _table(attention: TimmModule, shared: TimmModule | None, grid: Grid) -> Tensor | None:
    """Return the sum of the block's table and the shared one at a grid: ``(distances, heads)``.

    The result is None if the model has neither.
    """
    owners = [m for m in (attention, shared) if m is not None and m.relative_position_bias_table is not None]
    tables = [_resampled(m.relative_position_bias_table, tuple(m.window_size), grid) for m in owners]
    return torch.stack(tables).sum(0) if tables else None


def _resampled(table: Tensor, old: Grid, new: Grid) -> Tensor:
    shape = ((2 * new[0] - 1) * (2 * new[1] - 1) + 3, table.shape[1])
    if new == old:
        return table
    resized: Tensor = derived(table, (old, new), lambda: resize_rel_pos_bias_table(table, new, shape, old))
    return resized
