"""Swin's windows on packed tokens: where timm cuts a grid into windows, and which rows belong to which window.

A cell is one position of the last stage's grid, with all tokens that merge into it. Cells are kept or dropped as a
whole. At a stage where a cell has ``side x side`` tokens, these rows are consecutive and in Z-order, down before right.
timm's ``PatchMerging`` joins four neighbours in this order, so merging is a view of the packed rows.
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
    """The size and shift of the windows into which a block cuts a grid, in tokens.

    timm shifts windows by rolling the grid and masking the windows that wrap around. That is the same as a lattice of
    windows that begins ``shift`` tokens further down and right, with smaller windows along the edges.
    """

    size: Grid
    shift: Grid


class Windows(NamedTuple):
    """The windows of a part's images. The kept tokens of each window form one segment."""

    rows: slice  # the part's rows, in the order of the windows
    cu_seqlens: Tensor  # int32 (images * windows + 1,): starts of the segments, counted from the part's first row
    positions: Tensor  # int32 (rows,): each token's position within its window, in raster order
    size: Grid


class Order(NamedTuple):
    """An order of a stage's tokens in which the tokens of each window are consecutive."""

    rows: Tensor  # int64 (total,): the packed row at each place of this order
    places: Tensor  # int64 (total,): the place in this order of each packed row
    windows: list[Windows]  # one entry per part


def merges(stage: TimmModule) -> bool:
    """Return whether the stage begins by merging four patches into one."""
    return type(stage.downsample) in MERGINGS


def cell_side(model: TimmModule) -> int:
    """Return the side of a cell in patches. A cell has as many rows as columns."""
    side: int = 2 ** sum(merges(stage) for stage in model.layers)
    return side


def stages_of(model: TimmModule) -> list[tuple[TimmModule, int]]:
    """Return each stage with the side of a cell in tokens of that stage."""
    stages, side = [], cell_side(model)
    for stage in model.layers:
        side = side // 2 if merges(stage) else side
        stages.append((stage, side))
    return stages


@eager
def cut_of(model: TimmModule, number: int, block: TimmModule, grid: Grid, side: int) -> Cut:
    """Return how a block cuts its grid into windows.

    At a grid other than the model's own, the windows are those that timm's ``set_input_size`` would set.

    Args:
        model: a Swin Transformer.
        number: index of the stage in ``model.layers``.
        block: a block of that stage.
        grid: rows and columns of cells.
        side: side of a cell in tokens of that stage.
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
    """Return whether whole windows fill the grid, so that timm pads nothing.

    timm's padding takes part in attention, which packed tokens do not reproduce.
    """
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
    """Return the patches of cells in packed order: int32 ``(..., side * side)``. Cell -1 has patches -1.

    Args:
        cells: int32 ``(...)``, cells numbered in raster order.
        grid: rows and columns of cells.
        side: side of a cell in patches.
    """
    down, right = _coordinates(cells, grid, side)
    return (down * (grid[1] * side) + right).where(cells[..., None] >= 0, -1)


def _coordinates(cells: Tensor, grid: Grid, side: int) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each token of the cells on the token grid: int32 ``(..., side * side)`` each."""
    four = torch.arange(4, dtype=torch.int32, device=cells.device)
    down = right = four.new_zeros(1)
    while len(down) < side**2:
        down, right = ((2 * far[:, None] + near).flatten() for far, near in ((down, four % 2), (right, four // 2)))
    return (cells // grid[1] * side)[..., None] + down, (cells % grid[1] * side)[..., None] + right


def windows_across(grid: Grid, side: int, size: Grid, shift: Grid) -> Grid:
    """Return the numbers of windows per column and per row of a grid of cells."""
    rows, columns = (n * side // length + (by > 0) for n, length, by in zip(grid, size, shift, strict=True))
    return rows, columns


@eager  # the number of windows differs per batch, and compiling would gain nothing here
def order_by_windows(positions: Tensor, parts: list[Part], cuts: tuple[Cut, ...], side: int) -> Order:
    """Return the order that sorts the tokens of a stage by window.

    A window without tokens is an empty segment, so no number has to be read back from the device.

    Args:
        positions: int32 ``(cells,)``: the kept cells, as in :class:`Packed`.
        parts: the parts of the batch, in cells.
        cuts: the windows of each part's grid.
        side: side of a cell in tokens of the stage.
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
