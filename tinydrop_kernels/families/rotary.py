"""Rotary embeddings of packed tokens.

A rotary embedding turns queries and keys by an angle that follows from where a patch is. Kept tokens take the angles of
their own places at their own grid; prefix tokens are not turned. Axial angles serve all blocks, mixed ones one block.
"""

import copy

import torch
from torch import Tensor

from tinydrop_kernels.ops.derived import derived
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule
from tinydrop_kernels.torch_internals import eager


class PackedRope:
    """The embedding of the packed tokens, block by block.

    Args:
        rope: timm's module, or None for a model without.
        is_mixed: whether each block and head has its own.
        packed: with positions.
        parts: the grids, and how many rows each has.
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
        """``(total, 1 or heads, 2 * head_dim)``, sines before cosines; None for a model without."""
        if not (self._is_mixed and self._of_grids):
            return self._shared
        return torch.cat([table[number][:, place] for table, place in self._of_grids], 1).transpose(0, 1)


def embedding_at(rope: TimmModule, grid: Grid) -> Tensor:
    """``([depth, heads,] patches, 2 * head_dim)`` as timm makes it at a grid.

    A module has it ready at its model's own size, updated when the size is set anew, or computes it at every call.
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


@eager  # they are kept between calls, and made by what cannot be traced
def _tables(rope: TimmModule, grids: list[Grid]) -> list[Tensor]:
    return [_with_identity_at(rope, grid) for grid in grids]


def _with_identity_at(rope: TimmModule, grid: Grid) -> Tensor:
    """One row more, of no turn: prefix tokens, whose position is -1, find it at the end."""

    def make() -> Tensor:
        embedded = embedding_at(rope, grid)
        sine, cosine = torch.zeros_like(embedded[..., :1, :]).chunk(2, -1)
        return torch.cat((embedded, torch.cat((sine, cosine + 1), -1)), -2)

    return derived((*rope.parameters(), *rope.buffers()), grid, make)
