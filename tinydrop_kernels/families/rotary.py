"""Rotary embeddings of packed tokens.

A rotary embedding turns queries and keys by an angle that follows from where a patch is. Kept tokens take the angles of
their own places at their own grid; prefix tokens are not turned. Axial angles serve all blocks, mixed ones one block.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from tinydrop_kernels.families.grids import derived
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule


def packed_rope(
    rope: TimmModule | None, is_mixed: bool, packed: Packed, parts: list[Part]
) -> Callable[[int], Tensor | None]:
    """The embedding of the packed tokens for a block: ``(total, 1 or heads, 2 * head_dim)``, sines before cosines.

    Args:
        rope: timm's module, or None for a model without.
        is_mixed: whether each block and head has its own.
        packed: with positions.
        parts: the grids, and how many rows each has.
    """
    if rope is None or packed.positions is None:
        return lambda block: None
    places = packed.positions.long().split([part.total for part in parts])
    of_grids = [(_with_identity_at(rope, part.grid), place) for part, place in zip(parts, places, strict=True)]
    if is_mixed:
        return lambda block: torch.cat([table[block][:, place] for table, place in of_grids], 1).transpose(0, 1)
    shared = torch.cat([table[place] for table, place in of_grids])[:, None]
    return lambda block: shared


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


def _with_identity_at(rope: TimmModule, grid: Grid) -> Tensor:
    """One row more, of no turn: prefix tokens, whose position is -1, find it at the end."""
    weight = next(rope.parameters(), None)

    def make() -> Tensor:
        embedded = embedding_at(rope, grid)
        sine, cosine = torch.zeros_like(embedded[..., :1, :]).chunk(2, -1)
        return torch.cat((embedded, torch.cat((sine, cosine + 1), -1)), -2)

    return derived(next(rope.buffers()) if weight is None else weight, grid, make)
