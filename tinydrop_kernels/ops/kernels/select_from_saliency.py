"""The kernel of ``select_from_saliency``."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.launcher import FUSED
from tinydrop_kernels.ops.kernels.select_common import OPTIONS, block_sizes, grids_on, predict, select_patches


# Do not specialise on these integers; otherwise the kernel would recompile when one equals 1 or is divisible by 16.
@triton.jit(do_not_specialize=["num_classes", "map_rows", "map_columns", "patches_stride"])
def select_from_saliency_kernel(
    logits_pointer,
    map_pointer,
    grids_pointer,
    indices_pointer,
    counts_pointer,
    levels_pointer,
    confidence_pointer,
    saliency_pointer,
    logits_batch_stride,
    logits_class_stride,
    map_batch_stride,
    map_row_stride,
    map_column_stride,
    num_classes,
    map_rows,
    map_columns,
    patches_stride,
    tau,
    gamma,
    min_keep,
    coarsen,
    NUM_LEVELS: tl.constexpr,
    BLOCK_SIZE_CLASS: tl.constexpr,
    BLOCK_SIZE_PATCH: tl.constexpr,
):
    """Select patches by a saliency map.

    Args:
        logits_pointer: of shape [batch, num_classes].
        map_pointer: the given saliency, of shape [batch, map_rows, map_columns].
        grids_pointer: rows and columns of the patch grid at each level, dense first; int32, of shape [NUM_LEVELS, 2].
        indices_pointer: kept patches in raster order, then -1; contiguous, of shape [batch, patches_stride].
        counts_pointer: number of kept patches, 0 for an exit; of shape [batch].
        levels_pointer: level of the image's own grid, of shape [batch].
        confidence_pointer: max softmax, of shape [batch].
        saliency_pointer: the resized map, then 0; contiguous, of shape [batch, patches_stride].
        logits_batch_stride, logits_class_stride: strides of the logits, in elements.
        map_batch_stride, map_row_stride, map_column_stride: strides of the map, in elements.
        num_classes, map_rows, map_columns: sizes of the above.
        patches_stride: patches of the dense grid.
        tau, gamma, min_keep, coarsen: the law, with tau = 1 in place of None.
        NUM_LEVELS: number of grids.
        BLOCK_SIZE_CLASS: classes in a tile.
        BLOCK_SIZE_PATCH: at least the patches of the dense grid.
    """
    # This program processes one image.
    image = tl.program_id(axis=0).to(tl.int64)
    confidence, _ = predict(
        logits_pointer + image * logits_batch_stride, logits_class_stride, num_classes, BLOCK_SIZE_CLASS
    )
    select_patches(
        image,
        confidence,
        map_pointer + image * map_batch_stride,
        map_row_stride,
        map_column_stride,
        map_rows,
        map_columns,
        grids_pointer,
        indices_pointer,
        counts_pointer,
        levels_pointer,
        confidence_pointer,
        saliency_pointer,
        patches_stride,
        tau,
        gamma,
        min_keep,
        coarsen,
        NUM_LEVELS,
        BLOCK_SIZE_PATCH,
    )


def launch(
    selection: tuple[Tensor, ...],
    logits: Tensor,
    saliency: Tensor,
    grid_sizes: Sequence[int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    coarsen: float,
) -> tuple[Tensor, ...]:
    """Run :func:`ops.select_from_saliency`, write the result into ``selection`` and return it."""
    if len(logits) == 0:
        return selection
    num_patches = grid_sizes[0] * grid_sizes[1]
    with torch.cuda.device_of(logits):
        select_from_saliency_kernel[(len(logits),)](
            logits,
            saliency,
            grids_on(logits.device, tuple(grid_sizes)),
            *selection,
            *logits.stride(),
            *saliency.stride(),
            logits.shape[1],
            *saliency.shape[1:],
            num_patches,
            1.0 if tau is None else tau,  # no confidence is above 1
            gamma,
            min_keep,
            coarsen,
            NUM_LEVELS=len(grid_sizes) // 2,
            **block_sizes(logits.shape[1], num_patches),
            **FUSED,
            **OPTIONS,
        )
    return selection
