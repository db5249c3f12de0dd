"""Swin's windows on packed tokens: where timm would cut a grid, and which rows lie in which window.

What is kept or dropped is a cell: a place of the last stage's grid and all tokens that are merged into it. At a stage
where a cell is ``side x side`` tokens, they lie behind one another in Z-order, down before right: the order in which
timm's ``PatchMerging`` joins four neighbours, which therefore is a view of the packed rows.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from timm.models.swin_transformer import PatchMerging, calc_stage_window_sizes
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from torch import Tensor

from tinydrop_kernels.ops.types import Grid, Part, TimmModule
from tinydrop_kernels.torch_internals import eager

MERGINGS = (PatchMerging, PatchMergingV2)


class Cut(NamedTuple):
    """How a block cuts a grid into windows.

    Shifting is rolling the grid, with the windows that wrap around masked by region: windows on a lattice that begins
    ``shift`` further down and right, and smaller ones along the edges.
    """

    size: Grid
    shift: Grid


class Windows(NamedTuple):
    """The windows of a part's images, each a segment of the tokens that survive in it."""

    rows: slice  # of the tokens in the order at hand
    cu_seqlens: Tensor  # int32 (images * windows + 1,), counted from the part's first row
    positions: Tensor  # int32 (rows,): each token's place within its window, in raster order
    size: Grid


class Order(NamedTuple):
    """An order of a stage's tokens in which those of each window lie together."""

    rows: Tensor  # int64 (total,): which packed row is at each place
    places: Tensor  # int64 (total,): at which place each packed row is
    windows: list[Windows]  # of each part


def merges(stage: TimmModule) -> bool:
    """Whether the stage begins by merging patches, four into one."""
    return type(stage.downsample) in MERGINGS


def cell_side(model: TimmModule) -> int:
    """Rows, and columns, of patches in a cell."""
    side: int = 2 ** sum(merges(stage) for stage in model.layers)
    return side


def stages_of(model: TimmModule) -> list[tuple[TimmModule, int]]:
    """The stages, and how many rows, and columns, of tokens a cell has in each."""
    stages, side = [], cell_side(model)
    for stage in model.layers:
        side = side // 2 if merges(stage) else side
        stages.append((stage, side))
    return stages


@eager
def cut_of(model: TimmModule, number: int, block: TimmModule, grid: Grid, side: int) -> Cut:
    """How a block of the stage of this number cuts its grid; at a grid not the model's, as after ``set_input_size``.

    Args:
        model, number, block: as in ``model.layers[number].blocks``.
        grid: rows and columns of cells.
        side: rows, and columns, of the stage's tokens in a cell.
    """
    resolution = (grid[0] * side, grid[1] * side)
    if resolution == tuple(block.input_resolution):
        return Cut(tuple(block.window_size), tuple(block.shift_size))
    patches = (grid[0] * cell_side(model), grid[1] * cell_side(model))
    size = _stage_windows(patches, model._ref_window_sizes, model._ref_grid_size)[number]
    return _cut_by_timm(
        type(block)._calc_window_shift, resolution, size, tuple(block.target_shift_size), block.always_partition
    )


def is_whole(cut: Cut, grid: Grid, side: int) -> bool:
    """Whether the windows make up the grid, so that timm pads nothing: its padding would take part in attention."""
    return not any(n * side % length for n, length in zip(grid, cut.size, strict=True))


@cache
def _stage_windows(patches: Grid, reference_sizes: tuple[Grid, ...], reference_grid: Grid) -> tuple[Grid, ...]:
    sizes: tuple[Grid, ...] = calc_stage_window_sizes(patches, reference_sizes, reference_grid)
    return sizes


@cache
def _cut_by_timm(calculate: Any, resolution: Grid, size: Grid, shift: Grid, always_partition: bool) -> Cut:
    state = SimpleNamespace(input_resolution=resolution, target_shift_size=shift, always_partition=always_partition)
    return Cut(*calculate(state, size))


def patch_numbers(cells: Tensor, grid: Grid, side: int) -> Tensor:
    """The patches of cells, in the order in which they are packed: int32 ``(..., side * side)``, -1 of cell -1.

    Args:
        cells: int32 ``(...)``, raster order.
        grid: rows and columns of cells.
        side: rows, and columns, of patches in a cell.
    """
    down, right = _coordinates(cells, grid, side)
    return (down * (grid[1] * side) + right).where(cells[..., None] >= 0, -1)


def _coordinates(cells: Tensor, grid: Grid, side: int) -> tuple[Tensor, Tensor]:
    """Row and column of the tokens of cells on their own grid: int32 ``(..., side * side)`` each."""
    four = torch.arange(4, dtype=torch.int32, device=cells.device)
    down = right = four.new_zeros(1)
    while len(down) < side**2:
        down, right = ((2 * far[:, None] + near).flatten() for far, near in ((down, four % 2), (right, four // 2)))
    return (cells // grid[1] * side)[..., None] + down, (cells % grid[1] * side)[..., None] + right


def windows_across(grid: Grid, side: int, size: Grid, shift: Grid) -> Grid:
    """How many windows lie below one another and beside one another on a grid of cells."""
    rows, columns = (n * side // length + (by > 0) for n, length, by in zip(grid, size, shift, strict=True))
    return rows, columns


@eager  # numbers of windows change from batch to batch, and nothing here is worth compiling
def order_by_windows(positions: Tensor, parts: list[Part], cuts: tuple[Cut, ...], side: int) -> Order:
    """Sort the tokens of a stage by window. Reads nothing back: a window without tokens is an empty segment.

    Args:
        positions: int32 ``(cells,)``: the kept cells, as in :class:`Packed`.
        parts: of the batch, in cells.
        cuts: of each part's grid.
        side: rows, and columns, of tokens in a cell.
    """
    rows, windows, first = [], [], 0
    for part, (size, shift) in zip(parts, cuts, strict=True):
        cells, images = positions[first : first + part.total], len(part.images)
        image = torch.arange(images, device=cells.device)
        image = image.repeat_interleave(part.cu_seqlens.diff(), output_size=part.total)[:, None]
        down, right = _coordinates(cells, part.grid, side)
        if shift[0]:
            down = down + size[0] - shift[0]
        if shift[1]:
            right = right + size[1] - shift[1]
        area = size[0] * size[1]
        per_column, per_row = windows_across(part.grid, side, size, shift)
        window = (image * per_column + down // size[0]) * per_row + right // size[1]
        place = down % size[0] * size[1] + right % size[1]
        ordered, own = (window * area + place).flatten().sort()
        edges = torch.arange(images * per_column * per_row + 1, device=cells.device) * area
        starts = torch.searchsorted(ordered, edges, out_int32=True)
        place = (ordered % area).int()
        start = first * side**2
        windows.append(Windows(slice(start, start + len(own)), starts, place, size))
        rows.append(own + start)
        first += part.total
    joined = torch.cat(rows)
    places = torch.empty_like(joined).scatter_(0, joined, torch.arange(len(joined), device=joined.device))
    return Order(joined, places, windows)
