"""From the guidance model's output to kept patches in one launch: closed-form Grad-CAM in front of the selection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.select_from_saliency import (
    MAX_REGISTERS,
    NUM_WARPS,
    TILE_SIZE,
    block_sizes,
    predict,
    select_patches,
)
from tinydrop_kernels.ops.select_tokens import empty_selection


@triton.jit
def class_activation_map(
    features_pointer,
    weight_pointer,
    cam_pointer,
    cell_stride,
    channel_stride,
    weight_channel_stride,
    num_cells,
    num_channels,
    BLOCK_SIZE_CELL: tl.constexpr,
    BLOCK_SIZE_CHANNEL: tl.constexpr,
):
    """Write relu(features . weight) of one image.

    Args:
        features_pointer: of shape [num_cells, num_channels].
        weight_pointer: the predicted class's row of the head, of shape [num_channels].
        cam_pointer: contiguous, of shape [num_cells].
    """
    for cell_start in range(0, num_cells, BLOCK_SIZE_CELL):
        cells = cell_start + tl.arange(0, BLOCK_SIZE_CELL)
        products = tl.zeros((BLOCK_SIZE_CELL, BLOCK_SIZE_CHANNEL), tl.float32)
        # The strides are specialised: Triton sees which of them is 1 and lays the tile's threads along that axis.
        for channel_start in range(0, num_channels, BLOCK_SIZE_CHANNEL):
            channels = channel_start + tl.arange(0, BLOCK_SIZE_CHANNEL)
            mask = (cells < num_cells)[:, None] & (channels < num_channels)[None, :]
            offsets = cells[:, None] * cell_stride + channels[None, :] * channel_stride
            features = tl.load(features_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_pointer + channels * weight_channel_stride, mask=channels < num_channels, other=0.0)
            products += features * weight.to(tl.float32)[None, :]
        cam = tl.sum(products, axis=1)
        tl.store(cam_pointer + cells, tl.where(cam < 0.0, 0.0, cam), mask=cells < num_cells)  # a maximum loses NaN


@triton.jit(do_not_specialize=["num_classes", "feature_rows", "feature_columns", "rows", "columns"])
def select_tokens_kernel(
    logits_pointer,
    features_pointer,
    class_weight_pointer,
    cam_pointer,
    indices_pointer,
    counts_pointer,
    confidence_pointer,
    saliency_pointer,
    logits_batch_stride,
    logits_class_stride,
    features_batch_stride,
    features_cell_stride,
    features_channel_stride,
    weight_class_stride,
    weight_channel_stride,
    num_classes,
    num_channels,
    feature_rows,
    feature_columns,
    rows,
    columns,
    tau,
    gamma,
    min_keep,
    NORMALISE: tl.constexpr,
    BLOCK_SIZE_CLASS: tl.constexpr,
    BLOCK_SIZE_CELL: tl.constexpr,
    BLOCK_SIZE_CHANNEL: tl.constexpr,
    BLOCK_SIZE_PATCH: tl.constexpr,
):
    """Select patches by the guidance model's logits and last feature map.

    Args:
        logits_pointer: of shape [batch, num_classes].
        features_pointer: of shape [batch, feature_rows * feature_columns, num_channels].
        class_weight_pointer: of shape [num_classes, num_channels].
        cam_pointer: scratch for the saliency before it is resized; contiguous, of shape
            [batch, feature_rows * feature_columns].
        indices_pointer: kept patches in raster order, then -1; contiguous, of shape [batch, rows * columns].
        counts_pointer: number of kept patches, 0 for an exit; of shape [batch].
        confidence_pointer: max softmax, of shape [batch].
        saliency_pointer: the resized map, normalised if NORMALISE; contiguous, of shape [batch, rows, columns].
    """
    # This program processes one image.
    image = tl.program_id(axis=0).to(tl.int64)
    confidence, predicted = predict(
        logits_pointer + image * logits_batch_stride, logits_class_stride, num_classes, BLOCK_SIZE_CLASS
    )
    num_cells = feature_rows * feature_columns
    cam_pointer += image * num_cells
    class_activation_map(
        features_pointer + image * features_batch_stride,
        class_weight_pointer + predicted.to(tl.int64) * weight_class_stride,
        cam_pointer,
        features_cell_stride,
        features_channel_stride,
        weight_channel_stride,
        num_cells,
        num_channels,
        BLOCK_SIZE_CELL,
        BLOCK_SIZE_CHANNEL,
    )
    tl.debug_barrier()  # the resizing reads cells that other threads stored
    select_patches(
        image,
        confidence,
        cam_pointer,
        feature_columns,
        1,
        feature_rows,
        feature_columns,
        indices_pointer,
        counts_pointer,
        confidence_pointer,
        saliency_pointer,
        rows,
        columns,
        tau,
        gamma,
        min_keep,
        NORMALISE,
        BLOCK_SIZE_PATCH,
    )


def launch(
    logits: Tensor,
    features: Tensor,
    class_weight: Tensor,
    feature_size: tuple[int, int],
    grid_size: tuple[int, int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ops.select_tokens`."""
    selection = empty_selection(logits, grid_size)
    if len(logits) == 0:
        return selection
    (_, num_cells, num_channels), num_classes = features.shape, logits.shape[1]
    cell_block_size = min(triton.next_power_of_2(num_cells), 64)
    with torch.cuda.device_of(logits):
        select_tokens_kernel[(len(logits),)](
            logits,
            features,
            class_weight,
            logits.new_empty(len(logits), num_cells, dtype=torch.float32),
            *selection,
            *logits.stride(),
            *features.stride(),
            *class_weight.stride(),
            num_classes,
            num_channels,
            *feature_size,
            *grid_size,
            1.0 if tau is None else tau,  # no confidence is above 1
            gamma,
            min_keep,
            normalise,
            **block_sizes(num_classes, grid_size[0] * grid_size[1]),
            BLOCK_SIZE_CELL=cell_block_size,
            BLOCK_SIZE_CHANNEL=min(triton.next_power_of_2(num_channels), TILE_SIZE // cell_block_size),
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return selection
