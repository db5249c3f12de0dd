"""The kernel of ``select_tokens``: closed-form Grad-CAM and the selection in one launch."""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.launcher import Launcher, LaunchPlan, aligned
from tinydrop_kernels.ops.kernels.saliency import combine_parts, mix_classes, weigh_features
from tinydrop_kernels.ops.kernels.select_common import (
    OPTIONS,
    TILE_SIZE,
    block_sizes,
    grids_on,
    predict,
    select_patches,
)


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
    center_weight,
    CLASSES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_COMBINED: tl.constexpr,
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
        logits_batch_stride to weight_channel_stride: strides of logits, features and class_weight, in elements.
        num_classes, num_channels, feature_rows, feature_columns: sizes of the above.
        patches_stride: patches of the dense grid.
        tau, gamma, min_keep, coarsen: the law, with tau = 1 in place of None.
        norm_weight, center_weight: weights of the saliency's other parts.
        CLASSES: number of most probable classes whose Grad-CAM is summed.
        HAS_NORM: whether norm_weight is not 0.
        IS_COMBINED: whether norm_weight or center_weight is not 0.
        NUM_LEVELS: number of grids.
        BLOCK_SIZE_CLASS: classes in a tile.
        BLOCK_SIZE_FEATURE, BLOCK_SIZE_CHANNEL: size of a tile of features.
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
        tl.debug_barrier()  # weigh_features reads weights that other threads stored
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
    if IS_COMBINED:
        combine_parts(
            cam_pointer,
            norm_pointer,
            feature_rows,
            feature_columns,
            norm_weight,
            center_weight,
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


@functools.lru_cache(maxsize=64)
def plan_launch(
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
    center: float,
) -> LaunchPlan:
    """Return the launch plan; ``dtypes`` and ``strides`` are those of logits, features and class_weight."""
    _, num_features, num_channels = feature_shape
    num_patches = grid_sizes[0] * grid_sizes[1]
    sizes = block_sizes(num_classes, num_patches)
    feature_block_size = min(triton.next_power_of_2(num_features), 64)
    integers = (*itertools.chain(*strides), num_classes, num_channels, *feature_size, num_patches)
    tau = 1.0 if tau is None else tau  # no confidence is above 1
    constants = (
        min(classes, num_classes),
        norm != 0,
        norm != 0 or center != 0,
        len(grid_sizes) // 2,
        sizes["BLOCK_SIZE_CLASS"],
        feature_block_size,
        min(triton.next_power_of_2(num_channels), TILE_SIZE // feature_block_size),
        triton.next_power_of_2(num_channels),
        sizes["BLOCK_SIZE_PATCH"],
    )
    return LaunchPlan(
        Launcher(select_tokens_kernel, device, (dtypes, integers, constants), OPTIONS),
        (*integers, tau, gamma, min_keep, coarsen, norm, center, *constants),
        grid=(batch, 1, 1),
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
    center: float,
) -> tuple[Tensor, ...]:
    """Run :func:`ops.select_tokens`, write the result into ``selection`` and return it."""
    if logits.shape[0] == 0:
        return selection
    plan = plan_launch(
        logits.device,
        (logits.dtype, features.dtype, class_weight.dtype),
        *logits.shape,
        features.shape,
        (logits.stride(), features.stride(), class_weight.stride()),
        tuple(feature_size),
        tuple(grid_sizes),
        *(tau, gamma, min_keep, coarsen),
        *(classes, norm, center),
    )
    _, num_features, num_channels = features.shape
    scratch = logits.new_empty(len(logits), 2 * num_features + num_channels, dtype=torch.float32)
    grids = grids_on(logits.device, tuple(grid_sizes))
    tensors = (logits, features, class_weight, scratch, grids, *selection)
    plan.launcher(plan.grid, (*tensors, *plan.numbers), aligned(logits, features, class_weight))
    return selection
