"""Features of the whole grid, made from the tokens of the kept patches. A dropped patch gets the nearest kept one's."""

import torch
from torch import Tensor

from tinydrop_kernels.ops import Packed, Part
from tinydrop_kernels.ops.types import Grid

TIE = 1e-4  # squared patches; rounding slack for a dense patch at equal distance from two patches of a coarser grid


def features_in_place(
    tokens: Tensor, packed: Packed, indices: Tensor, parts: list[Part], dense: Grid, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return features on the dense grid from packed tokens.

    Args:
        tokens: packed tokens ``(total, dim)``. Every image must have a segment.
        packed, parts: the layout of the tokens.
        indices: int32 ``(batch, patches)``, as in :class:`ops.Selection`.
        dense: rows and columns of the dense grid.
        num_prefix_tokens: number of prefix tokens of each segment, which are left out.

    Returns:
        Features ``(batch, dim, rows, columns)`` and a mask, bool ``(batch, rows, columns)``, as from
        :meth:`TinyDrop.features`.
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
    """Return, for each patch of the dense grid, the kept patch with the nearest center. Ties go to the first.

    Args:
        indices: int32 ``(n, patches)``: per image the kept patches, at least one, then -1.
        grid: rows and columns of the images' own grid, which ``indices`` refer to.
        dense: rows and columns of the dense grid.

    Returns:
        int64 ``(n, rows * columns)``: position of the kept patch in ``indices``. Also bool of the same shape: whether
        that kept patch covers the dense patch.
    """
    rows, columns = dense
    place = torch.arange(rows * columns, device=indices.device)
    center = torch.stack((place // columns + 0.5, place % columns + 0.5), -1)  # in patches of the dense grid
    scale = torch.tensor([rows / grid[0], columns / grid[1]], device=indices.device)
    kept = torch.stack((indices // grid[1] + 0.5, indices % grid[1] + 0.5), -1) * scale
    distance = (center[:, None] - kept[:, None]).square().sum(-1)  # (n, places, patches)
    least, nearest = distance.masked_fill((indices < 0)[:, None], float("inf")).min(-1)
    own = ((center / scale).floor() + 0.5) * scale  # center of the own grid's patch, kept or not, that lies there
    return nearest, least <= (center - own).square().sum(-1) + TIE
