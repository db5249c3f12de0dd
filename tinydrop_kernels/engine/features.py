"""Features of a whole grid from the tokens of the kept patches: dropped places show the nearest kept one."""

import torch
from torch import Tensor

from tinydrop_kernels.ops import Packed, Part
from tinydrop_kernels.ops.types import Grid

TIE = 1e-4  # patches squared: a place on the border of two patches of a coarser grid is as near to both


def features_in_place(
    tokens: Tensor, packed: Packed, indices: Tensor, parts: list[Part], dense: Grid, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Kept patches' features put where the patches are.

    Args:
        tokens: ``(total, dim)``, one row for each prefix token and each kept patch; of every image.
        packed, parts: where they are.
        indices: int32 ``(batch, patches)``, as in :class:`ops.Selection`.
        dense: rows and columns of the answer.
        num_prefix_tokens: rows of each segment that are left out.

    Returns:
        ``(batch, dim, rows, columns)`` and bool ``(batch, rows, columns)``, as :meth:`TinyDrop.features`.
    """
    rows, columns = dense
    out = tokens.new_empty(len(indices), rows * columns, tokens.shape[1])
    mask = torch.empty(len(indices), rows * columns, dtype=torch.bool, device=tokens.device)
    first = 0
    for part in parts:
        places, kept = nearest_kept(indices[part.images], part.grid, dense)
        starts = packed.cu_seqlens[first : first + len(part.images), None] + num_prefix_tokens
        first += len(part.images)
        out[part.images], mask[part.images] = tokens[starts + places], kept
    return out.transpose(1, 2).unflatten(2, dense), mask.unflatten(1, dense)


def nearest_kept(indices: Tensor, grid: Grid, dense: Grid) -> tuple[Tensor, Tensor]:
    """For each place of the dense grid the kept patch whose center is nearest to its own; of several the first.

    Args:
        indices: int32 ``(n, patches)``: kept patches of a grid, then -1; at least one each.
        grid: rows and columns that the indices count.
        dense: rows and columns of the places.

    Returns:
        int64 ``(n, rows * columns)``: which of the kept patches, counted from 0, and bool: whether it lies there.
    """
    rows, columns = dense
    place = torch.arange(rows * columns, device=indices.device)
    center = torch.stack((place // columns + 0.5, place % columns + 0.5), -1)  # in patches of the dense grid
    scale = torch.tensor([rows / grid[0], columns / grid[1]], device=indices.device)
    kept = torch.stack((indices // grid[1] + 0.5, indices % grid[1] + 0.5), -1) * scale
    distance = (center[:, None] - kept[:, None]).square().sum(-1)  # (n, places, patches)
    least, nearest = distance.masked_fill((indices < 0)[:, None], float("inf")).min(-1)
    own = ((center / scale).floor() + 0.5) * scale  # the center of the patch, kept or not, that lies there
    return nearest, least <= (center - own).square().sum(-1) + TIE
