"""Rotary embeddings of packed tokens.

A rotary embedding rotates queries and keys by an angle that depends on the position of the patch. A kept token gets the
angle of its position on its image's own grid. Prefix tokens are not rotated. Axial embeddings are shared by all blocks,
and mixed embeddings differ per block and head.
"""

import copy

import torch
from torch import Tensor

from tinydrop_kernels.ops.derived import derived
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule
from tinydrop_kernels.torch_internals import eager


class PackedRope:
    """The rotary embedding of the packed tokens, per block.

    Args:
        rope: timm's module; None if the model has no rotary embedding.
        is_mixed: whether each block and head has its own embedding.
        packed: layout of the tokens, with positions.
        parts: the parts of the batch, one per grid.
    """

    def __init__(self, rope: TimmModule | None, is_mixed: bool, packed: Packed, parts: list[Part]):
        self._is_mixed, self._shared = is_mixed, None
        self._of_grids: list[tuple[Tensor, Tensor]] = []
        if rope is not None and packed.positions is not None:
            places = packed.positions.long().split([part.total for part in parts])
            tables = _tables(rope, [part.grid for part in parts])
            self._of_grids = list(zip(tables, places, strict=True))
            if not is_mixed:
                self._shared = torch.cat([table[place] for table, place in self._of_grids])[:, None]

    def of_block(self, number: int) -> Tensor | None:
        """Return a block's ``(total, 1 or heads, 2 * head_dim)``, sines before cosines.

        The result is None if the model has no rotary embedding.
        """
        if not (self._is_mixed and self._of_grids):
            return self._shared
        return torch.cat([table[number][:, place] for table, place in self._of_grids], 1).transpose(0, 1)


def embedding_at(rope: TimmModule, grid: Grid) -> Tensor:
    """Return timm's embedding at a grid: ``([depth, heads,] patches, 2 * head_dim)``.

    Some of timm's modules hold the embedding of one grid, and a copy is updated to another grid. Other modules compute
    the embedding of any grid at every call.
    """
    fixed = getattr(rope, "feat_shape", None)
    embedded: Tensor
    if fixed is None:
        embedded = rope.get_embed(shape=list(grid))
        return embedded
    if tuple(fixed) != grid:
        rope = copy.deepcopy(rope)
        rope.update_feat_shape(list(grid))
    embedded = rope.get_embed()
    return embedded


@eager  # the tables are kept between calls and computed by timm's code, which torch.compile cannot trace
def _tables(rope: TimmModule, grids: list[Grid]) -> list[Tensor]:
    return [_with_identity_at(rope, grid) for grid in grids]


def _with_identity_at(rope: TimmModule, grid: Grid) -> Tensor:
    """Return the table of a grid with one more row at the end, which rotates by zero.

    Prefix tokens have position -1, so they index this row.
    """

    def make() -> Tensor:
        embedded = embedding_at(rope, grid)
        sine, cosine = torch.zeros_like(embedded[..., :1, :]).chunk(2, -1)
        return torch.cat((embedded, torch.cat((sine, cosine + 1), -1)), -2)

    return derived((*rope.parameters(), *rope.buffers()), grid, make)
