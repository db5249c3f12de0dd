"""Device functions for the saliency of the guidance model's feature map: Grad-CAM and the other parts."""

import triton
import triton.language as tl

from tinydrop_kernels.ops.kernels.select_common import finite_range


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
    """Sum the head's rows of the most probable classes, each weighted by its probability over that of the first class.

    Args:
        logits_pointer: logits of one image, of shape [num_classes].
        weight_pointer: the head's weight, of shape [num_classes, num_channels].
        mixed_pointer: output, contiguous, of shape [num_channels].
        CLASSES: number of classes to sum, at most num_classes.
        BLOCK_SIZE_MIXED: at least num_channels.
    """
    channels = tl.arange(0, BLOCK_SIZE_MIXED)
    mixed = tl.zeros((BLOCK_SIZE_MIXED,), tl.float32)
    peak = float("inf")
    last = float("inf")
    last_class = -1
    for turn in range(CLASSES):
        # Find the next class: the greatest logit that is less than the last one, or equal but of a higher index.
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
        features_pointer: the image's features, of shape [num_features, num_channels].
        weight_pointer: weight of each channel, of shape [num_channels].
        cam_pointer, norm_pointer: outputs, contiguous, of shape [num_features].
    """
    for first in range(0, num_features, BLOCK_SIZE_FEATURE):
        places = first + tl.arange(0, BLOCK_SIZE_FEATURE)
        products = tl.zeros((BLOCK_SIZE_FEATURE, BLOCK_SIZE_CHANNEL), tl.float32)
        squares = tl.zeros((BLOCK_SIZE_FEATURE, BLOCK_SIZE_CHANNEL), tl.float32)
        # The strides are specialised, so that Triton sees which one is 1 and puts the tile's threads along that axis.
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
        # Use where instead of maximum, because maximum drops NaN.
        tl.store(cam_pointer + places, tl.where(cam < 0.0, 0.0, cam), mask=places < num_features)
        if HAS_NORM:
            tl.store(norm_pointer + places, tl.sqrt(tl.sum(squares, axis=1)), mask=places < num_features)


@triton.jit
def unit(value, low, high):
    """Return ``(value - low) / (high - low)``, clamped; 0 if low equals high, NaN where value is NaN."""
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
    center_weight,
    HAS_NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Run :func:`ops.saliency.combine` for one image: cam, of shape [rows, columns], becomes the sum of the parts."""
    low, high = finite_range(cam_pointer, columns, 1, rows, columns, BLOCK_SIZE)
    norm_low, norm_high = low, high
    if HAS_NORM:
        norm_low, norm_high = finite_range(norm_pointer, columns, 1, rows, columns, BLOCK_SIZE)
    tl.debug_barrier()  # no thread may overwrite a cell before the ranges are known
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
        tl.store(cam_pointer + places, saliency + center_weight * closeness, mask=mask)
