"""FLOPs of Swin Transformers, dense and packed."""

import math

from tinydrop_kernels.families.embedding import embeds_kept_only
from tinydrop_kernels.families.flops import count_flops, linear_flops
from tinydrop_kernels.families.swin_windows import Cut, cell_side, cut_of, stages_of
from tinydrop_kernels.ops.types import Grid, TimmModule


def flops(model: TimmModule, counts: list[int], grid: Grid) -> int:
    """Return an upper bound of the FLOPs of a packed forward (:meth:`base.Family.flops`).

    Attention is counted as if the kept cells filled as few windows as possible.
    """
    return sum(_flops(model, cells, grid, is_packed=True) for cells in counts if cells)


def dense_flops(model: TimmModule, images: int, grid: Grid) -> int:
    """Return the FLOPs of timm's own forward (:meth:`base.Family.dense_flops`)."""
    once = 0  # SwinV2 computes its biases once per call, for any number of images
    for number, (stage, side) in enumerate(stages_of(model)):
        for block in stage.blocks:
            rows, columns = cut_of(model, number, block, grid, side).size
            distances = (2 * rows - 1) * (2 * columns - 1)
            once += distances * sum(map(linear_flops, getattr(block.attn, "cpb_mlp", ())))
    return once + images * _flops(model, grid[0] * grid[1], grid, is_packed=False)


def _flops(model: TimmModule, cells: int, grid: Grid, is_packed: bool) -> int:
    """Return the FLOPs of one image without those of SwinV2's biases."""
    total, side = linear_flops(model.head.fc), cell_side(model)
    patch_embed = model.patch_embed
    if embeds_kept_only(model, with_norm=True):
        total += cells * side**2 * 2 * patch_embed.proj.weight.numel()
    else:
        height, width = patch_embed.patch_size
        total += count_flops(patch_embed, (model.in_chans, grid[0] * side * height, grid[1] * side * width))
    for number, (stage, side) in enumerate(stages_of(model)):
        tokens = cells * side**2
        total += tokens * linear_flops(getattr(stage.downsample, "reduction", None))
        for block in stage.blocks:
            linear = (block.attn.qkv, block.attn.proj, *block.mlp.modules())
            pairs = _pairs(tokens, grid, side, cut_of(model, number, block, grid, side), is_packed)
            total += tokens * sum(map(linear_flops, linear)) + pairs * 4 * block.attn.proj.in_features
    return total


def _pairs(tokens: int, grid: Grid, side: int, cut: Cut, is_packed: bool) -> int:
    """Return the number of query-key pairs of an image.

    timm computes all pairs of whole windows. For packed tokens the result is an upper bound.
    """
    rows, columns = cut.size
    if not is_packed:
        return tokens * rows * columns
    edges = [_lengths(n * side, length, by) for n, length, by in zip(grid, cut.size, cut.shift, strict=True)]
    everything = math.prod(sum(length**2 for length in lengths) for lengths in edges)
    return min(tokens**2, tokens * rows * columns, everything)


def _lengths(tokens: int, length: int, by: int) -> list[int]:
    """Return the lengths of the windows along one side of a grid. Shifted windows are shorter at both ends."""
    return [by, *[length] * (tokens // length - 1), length - by] if by else [length] * (tokens // length)
