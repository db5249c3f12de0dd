"""From the guidance model's output to kept patches in one launch: closed-form Grad-CAM in front of the selection."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.direct import Launcher, aligned
from tinydrop_kernels.ops.kernels.select_from_saliency import (
    OPTIONS,
    TILE_SIZE,
    block_sizes,
    finite_range,
    grids_on,
    predict,
    select_patches,
)


@triton.jit
def mix_classes(
    logits_pointer,
    class_stride,
    num_classes,
    weight_pointer,
    weight_class_stride,
    weight_channel_stride,
    mixed_pointer,
    num_channels,
    CLASSES: tl.constexpr,
    BLOCK_SIZE_CLASS: tl.constexpr,
    BLOCK_SIZE_MIXED: tl.constexpr,
):
    """Sum the rows of the most probable classes, weighted by their probabilities over that of the first.

    Args:
        logits_pointer: of one image, of shape [num_classes].
        weight_pointer: of shape [num_classes, num_channels].
        mixed_pointer: output, contiguous, of shape [num_channels].
        CLASSES: how many of them, at most num_classes.
        BLOCK_SIZE_MIXED: at least num_channels.
    """
    channels = tl.arange(0, BLOCK_SIZE_MIXED)
    mixed = tl.zeros((BLOCK_SIZE_MIXED,), tl.float32)
    peak = float("inf")
    last = float("inf")
    last_class = -1
    for turn in range(CLASSES):
        # The greatest of what comes after the last one: less, or as great and of a higher index.
        greatest = tl.full((BLOCK_SIZE_CLASS,), -float("inf"), tl.float32)
        greatest_class = tl.full((BLOCK_SIZE_CLASS,), 2147483647, tl.int32)
        for start in range(0, num_classes, BLOCK_SIZE_CLASS):
            classes = start + tl.arange(0, BLOCK_SIZE_CLASS)
            logits = tl.load(logits_pointer + classes * class_stride, mask=classes < num_classes, other=-float("inf"))
            logits = logits.to(tl.float32)
            logits = tl.where(logits != logits, float("inf"), logits)
            is_left = (logits < last) | ((logits == last) & (classes > last_class))
            is_next = is_left & (classes < num_classes) & ((logits > greatest) | (greatest_class == 2147483647))
            greatest = tl.where(is_next, logits, greatest)
            greatest_class = tl.where(is_next, classes, greatest_class)
        last = tl.max(greatest, axis=0)
        last_class = tl.min(tl.where(greatest == last, greatest_class, 2147483647), axis=0)
        peak = tl.where(turn == 0, last, peak)
        share = tl.where(last == peak, 1.0, tl.exp(last - peak))
        row_pointer = weight_pointer + last_class.to(tl.int64) * weight_class_stride
        row = tl.load(row_pointer + channels * weight_channel_stride, mask=channels < num_channels, other=0.0)
        mixed += share * row.to(tl.float32)
    tl.store(mixed_pointer + channels, mixed, mask=channels < num_channels)


@triton.jit
def weigh_features(
    features_pointer,
    weight_pointer,
    cam_pointer,
    norm_pointer,
    feature_stride,
    channel_stride,
    weight_channel_stride,
    num_features,
    num_channels,
    HAS_NORM: tl.constexpr,
    BLOCK_SIZE_FEATURE: tl.constexpr,
    BLOCK_SIZE_CHANNEL: tl.constexpr,
):
    """Write relu(features . weight) of one image, and the norms of its features if HAS_NORM.

    Args:
        features_pointer: of shape [num_features, num_channels].
        weight_pointer: of shape [num_channels].
        cam_pointer, norm_pointer: outputs, contiguous, of shape [num_features].
    """
    for first in range(0, num_features, BLOCK_SIZE_FEATURE):
        places = first + tl.arange(0, BLOCK_SIZE_FEATURE)
        products = tl.zeros((BLOCK_SIZE_FEATURE, BLOCK_SIZE_CHANNEL), tl.float32)
        squares = tl.zeros((BLOCK_SIZE_FEATURE, BLOCK_SIZE_CHANNEL), tl.float32)
        # The strides are specialised: Triton sees which of them is 1 and lays the tile's threads along that axis.
        for channel_start in range(0, num_channels, BLOCK_SIZE_CHANNEL):
            channels = channel_start + tl.arange(0, BLOCK_SIZE_CHANNEL)
            mask = (places < num_features)[:, None] & (channels < num_channels)[None, :]
            offsets = places[:, None] * feature_stride + channels[None, :] * channel_stride
            features = tl.load(features_pointer + offsets, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(weight_pointer + channels * weight_channel_stride, mask=channels < num_channels, other=0.0)
            products += features * weight.to(tl.float32)[None, :]
            if HAS_NORM:
                squares += features * features
        cam = tl.sum(products, axis=1)
        # A maximum loses NaN.
        tl.store(cam_pointer + places, tl.where(cam < 0.0, 0.0, cam), mask=places < num_features)
        if HAS_NORM:
            tl.store(norm_pointer + places, tl.sqrt(tl.sum(squares, axis=1)), mask=places < num_features)


@triton.jit
def unit(value, low, high):
    """``(value - low) / (high - low)``, clamped; 0 where all are equal, NaN where value is."""
    share = tl.div_rn(tl.minimum(tl.maximum(value, low), high) - low, high - low)
    share = tl.where(high > low, share, 0.0)
    return tl.where(value != value, value, share)


@triton.jit
def combine_parts(
    cam_pointer,
    norm_pointer,
    rows,
    columns,
    norm_weight,
    centre_weight,
    HAS_NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """ops.saliency.combine for one image: cam, of shape [rows, columns], becomes the sum of the parts."""
    low, high = finite_range(cam_pointer, columns, 1, rows, columns, BLOCK_SIZE)
    norm_low, norm_high = low, high
    if HAS_NORM:
        norm_low, norm_high = finite_range(norm_pointer, columns, 1, rows, columns, BLOCK_SIZE)
    tl.debug_barrier()  # the ranges are known before any thread overwrites a cell
    down_corner = 0.5 / rows - 0.5
    right_corner = 0.5 / columns - 0.5
    corner = tl.sqrt(down_corner * down_corner + right_corner * right_corner)
    for first in range(0, rows * columns, BLOCK_SIZE):
        places = first + tl.arange(0, BLOCK_SIZE)
        mask = places < rows * columns
        saliency = unit(tl.load(cam_pointer + places, mask=mask, other=0.0), low, high)
        if HAS_NORM:
            saliency += norm_weight * unit(tl.load(norm_pointer + places, mask=mask, other=0.0), norm_low, norm_high)
        down = ((places // columns).to(tl.float32) + 0.5) / rows - 0.5
        right = ((places % columns).to(tl.float32) + 0.5) / columns - 0.5
        distance = tl.sqrt(down * down + right * right)
        closeness = tl.where(corner > 0.0, 1.0 - distance / corner, 1.0)
        tl.store(cam_pointer + places, saliency + centre_weight * closeness, mask=mask)


@triton.jit(do_not_specialize=["num_classes", "feature_rows", "feature_columns", "patches_stride"])
def select_tokens_kernel(
    logits_pointer,
    features_pointer,
    class_weight_pointer,
    scratch_pointer,
    grids_pointer,
    indices_pointer,
    counts_pointer,
    levels_pointer,
    confidence_pointer,
    saliency_pointer,
    logits_batch_stride,
    logits_class_stride,
    features_batch_stride,
    features_feature_stride,
    features_channel_stride,
    weight_class_stride,
    weight_channel_stride,
    num_classes,
    num_channels,
    feature_rows,
    feature_columns,
    patches_stride,
    tau,
    gamma,
    min_keep,
    coarsen,
    norm_weight,
    centre_weight,
    CLASSES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    BLOCK_SIZE_CLASS: tl.constexpr,
    BLOCK_SIZE_FEATURE: tl.constexpr,
    BLOCK_SIZE_CHANNEL: tl.constexpr,
    BLOCK_SIZE_MIXED: tl.constexpr,
    BLOCK_SIZE_PATCH: tl.constexpr,
):
    """Select patches by the guidance model's logits and last feature map.

    Args:
        logits_pointer: of shape [batch, num_classes].
        features_pointer: of shape [batch, feature_rows * feature_columns, num_channels].
        class_weight_pointer: of shape [num_classes, num_channels].
        scratch_pointer: activations, norms and mixed class weights of each image; float32, contiguous, of shape
            [batch, 2 * feature_rows * feature_columns + num_channels].
        grids_pointer, indices_pointer, counts_pointer, levels_pointer, confidence_pointer, saliency_pointer: as in
            :func:`select_from_saliency_kernel`.
        logits_batch_stride to weight_channel_stride: in elements.
        num_classes, num_channels, feature_rows, feature_columns: sizes of the above.
        patches_stride: patches of the dense grid.
        tau, gamma, min_keep, coarsen: the law, tau a number.
        norm_weight, centre_weight: of the parts of the saliency beside Grad-CAM.
        CLASSES: Grad-CAM is of so many of the most probable classes.
        HAS_NORM: whether norm_weight is not 0.
        HAS_PARTS: whether one of the weights is not 0.
        NUM_LEVELS: number of grids.
        BLOCK_SIZE_CLASS: classes of a tile.
        BLOCK_SIZE_FEATURE, BLOCK_SIZE_CHANNEL: a tile of features.
        BLOCK_SIZE_MIXED: at least num_channels.
        BLOCK_SIZE_PATCH: at least the patches of the dense grid.
    """
    # This program processes one image.
    image = tl.program_id(axis=0).to(tl.int64)
    logits_pointer += image * logits_batch_stride
    confidence, predicted = predict(logits_pointer, logits_class_stride, num_classes, BLOCK_SIZE_CLASS)
    num_features = feature_rows * feature_columns
    cam_pointer = scratch_pointer + image * (2 * num_features + num_channels)
    norm_pointer = cam_pointer + num_features
    if CLASSES == 1:
        weigh_features(
            features_pointer + image * features_batch_stride,
            class_weight_pointer + predicted.to(tl.int64) * weight_class_stride,
            cam_pointer,
            norm_pointer,
            features_feature_stride,
            features_channel_stride,
            weight_channel_stride,
            num_features,
            num_channels,
            HAS_NORM,
            BLOCK_SIZE_FEATURE,
            BLOCK_SIZE_CHANNEL,
        )
    else:
        mixed_pointer = norm_pointer + num_features
        mix_classes(
            logits_pointer,
            logits_class_stride,
            num_classes,
            class_weight_pointer,
            weight_class_stride,
            weight_channel_stride,
            mixed_pointer,
            num_channels,
            CLASSES,
            BLOCK_SIZE_CLASS,
            BLOCK_SIZE_MIXED,
        )
        tl.debug_barrier()  # the features are weighed by what other threads stored
        weigh_features(
            features_pointer + image * features_batch_stride,
            mixed_pointer,
            cam_pointer,
            norm_pointer,
            features_feature_stride,
            features_channel_stride,
            1,
            num_features,
            num_channels,
            HAS_NORM,
            BLOCK_SIZE_FEATURE,
            BLOCK_SIZE_CHANNEL,
        )
    tl.debug_barrier()  # the resizing reads cells that other threads stored
    if HAS_PARTS:
        combine_parts(
            cam_pointer,
            norm_pointer,
            feature_rows,
            feature_columns,
            norm_weight,
            centre_weight,
            HAS_NORM,
            BLOCK_SIZE_PATCH,
        )
        tl.debug_barrier()
    select_patches(
        image,
        confidence,
        cam_pointer,
        feature_columns,
        1,
        feature_rows,
        feature_columns,
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


class Plan(NamedTuple):
    """What calls on such arguments have in common."""

    launcher: Launcher
    grid: tuple[int, int, int]
    scratch: tuple[int, int]
    grids: Tensor
    numbers: tuple[float, ...]  # the kernel's arguments behind its tensors


@functools.lru_cache(maxsize=64)
def plan(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    batch: int,
    num_classes: int,
    feature_shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    feature_size: tuple[int, int],
    grid_sizes: tuple[int, ...],
    tau: float | None,
    gamma: float,
    min_keep: float,
    coarsen: float,
    classes: int,
    norm: float,
    centre: float,
) -> Plan:
    """Dtypes and strides are of logits, features and class_weight."""
    _, num_features, num_channels = feature_shape
    num_patches = grid_sizes[0] * grid_sizes[1]
    sizes = block_sizes(num_classes, num_patches)
    feature_block_size = min(triton.next_power_of_2(num_features), 64)
    integers = (*itertools.chain(*strides), num_classes, num_channels, *feature_size, num_patches)
    tau = 1.0 if tau is None else tau  # no confidence is above 1
    constants = (
        min(classes, num_classes),
        norm != 0,
        norm != 0 or centre != 0,
        len(grid_sizes) // 2,
        sizes["BLOCK_SIZE_CLASS"],
        feature_block_size,
        min(triton.next_power_of_2(num_channels), TILE_SIZE // feature_block_size),
        triton.next_power_of_2(num_channels),
        sizes["BLOCK_SIZE_PATCH"],
    )
    return Plan(
        Launcher(select_tokens_kernel, device, (dtypes, integers, constants), OPTIONS),
        (batch, 1, 1),
        (batch, 2 * num_features + num_channels),
        grids_on(device, grid_sizes),
        (*integers, tau, gamma, min_keep, coarsen, norm, centre, *constants),
    )


def launch(
    selection: tuple[Tensor, ...],
    logits: Tensor,
    features: Tensor,
    class_weight: Tensor,
    feature_size: Sequence[int],
    grid_sizes: Sequence[int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    coarsen: float,
    classes: int,
    norm: float,
    centre: float,
) -> tuple[Tensor, ...]:
    """See :func:`ops.select_tokens`; writes into and returns ``selection``."""
    if logits.shape[0] == 0:
        return selection
    launcher, grid, scratch, grids, numbers = plan(
        logits.device,
        (logits.dtype, features.dtype, class_weight.dtype),
        *logits.shape,
        features.shape,
        (logits.stride(), features.stride(), class_weight.stride()),
        tuple(feature_size),
        tuple(grid_sizes),
        *(tau, gamma, min_keep, coarsen),
        *(classes, norm, centre),
    )
    tensors = (logits, features, class_weight, logits.new_empty(*scratch, dtype=torch.float32), grids, *selection)
    launcher(grid, (*tensors, *numbers), aligned(logits, features, class_weight))
    return selection
