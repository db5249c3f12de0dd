"""Exit, how many patches, and which, from a saliency map; and the device functions shared with ``select_tokens``.

One program decides for one image from end to end, so that a batch is one launch and nothing is read back in between.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.select_tokens import empty_selection

ROUNDING_SLACK = tl.constexpr(reference.ROUNDING_SLACK)

# A batch rarely fills the GPU, so a program has a multiprocessor to itself and only its own warps hide latency: two for
# each of the four schedulers. Tiles of 16 elements a thread take at most 118 registers; twice as many took up to 252,
# and 16 warps spilled (ptxas, sm_80 to sm_100).
NUM_WARPS = 8
# Left to itself, the assembler spills a register or two on sm_100 for an occupancy that is of no use here.
MAX_REGISTERS = 255
TILE_SIZE = NUM_WARPS * 32 * 16


@triton.jit
def predict(logits_pointer, class_stride, num_classes, BLOCK_SIZE_CLASS: tl.constexpr):
    """Max softmax and argmax of one image's logits, of shape [num_classes].

    Like torch.argmax, takes the lower index among equals and NaN for the greatest.
    """
    greatest = tl.full((BLOCK_SIZE_CLASS,), -float("inf"), tl.float32)
    greatest_class = tl.zeros((BLOCK_SIZE_CLASS,), tl.int32)
    for start in range(0, num_classes, BLOCK_SIZE_CLASS):
        classes = start + tl.arange(0, BLOCK_SIZE_CLASS)
        logits = tl.load(logits_pointer + classes * class_stride, mask=classes < num_classes, other=-float("inf"))
        logits = logits.to(tl.float32)
        logits = tl.where(logits != logits, float("inf"), logits)
        greatest_class = tl.where(logits > greatest, classes, greatest_class)
        greatest = tl.maximum(logits, greatest)
    peak = tl.max(greatest, axis=0)
    predicted = tl.min(tl.where(greatest == peak, greatest_class, num_classes), axis=0)

    # A second pass over a row that is now cached: one pass would subtract infinities where a tile holds nothing finite.
    total = tl.zeros((BLOCK_SIZE_CLASS,), tl.float32)
    for start in range(0, num_classes, BLOCK_SIZE_CLASS):
        classes = start + tl.arange(0, BLOCK_SIZE_CLASS)
        logits = tl.load(logits_pointer + classes * class_stride, mask=classes < num_classes, other=-float("inf"))
        total += tl.exp(logits.to(tl.float32) - peak)
    # The peak itself adds exactly 1, so that the quotient, rounded to nearest, is never above 1.
    return tl.div_rn(1.0, tl.sum(total, axis=0)), predicted


@triton.jit
def keep_count(confidence, num_patches, tau, gamma, min_keep):
    """Number of patches to keep, 0 for an exit: reference.keep_counts for one image."""
    ratio = confidence / tau
    power = tl.exp2(gamma * tl.log2(ratio))
    power = tl.where((gamma == 0.0) & (ratio == ratio), 1.0, power)  # also where the product is 0 * -inf
    keep = tl.minimum(tl.maximum(1.0 - power, min_keep), 1.0)
    keep = tl.where(power == power, keep, 1.0)
    count = tl.ceil(keep * num_patches - ROUNDING_SLACK).to(tl.int32)
    count = tl.minimum(tl.maximum(count, 1), num_patches)
    return tl.where(confidence > tau, 0, count)


@triton.jit
def bilinear_neighbours(place, size, map_size):
    """The two cells of the map between which a place of the resized axis lies, and how far it is from the first.

    The rule of F.interpolate(align_corners=False), down to its not looking at a neighbour where the sizes are equal,
    which matters if that one is NaN.
    """
    # Rounded to nearest: Triton's own division can be an ulp off, which makes 1 of equal sizes less than 1.
    scale = tl.div_rn(map_size.to(tl.float32), size.to(tl.float32))
    # Fused, as PyTorch's compilers fuse it: the rounding decides whether a zero next to a salient cell stays a tie.
    source = tl.maximum(tl.fma(place.to(tl.float32) + 0.5, scale, -0.5), 0.0)
    low = tl.minimum(source.to(tl.int32), map_size - 1)
    high = tl.where(map_size == size, low, tl.minimum(low + 1, map_size - 1))
    return low, high, source - low.to(tl.float32)


@triton.jit
def finite_range(map_pointer, row_stride, column_stride, rows, columns, BLOCK_SIZE: tl.constexpr):
    """The least and the greatest finite cell of one image's map, of shape [rows, columns]; inf and -inf if none is."""
    low = tl.full((BLOCK_SIZE,), float("inf"), tl.float32)
    high = tl.full((BLOCK_SIZE,), -float("inf"), tl.float32)
    for start in range(0, rows * columns, BLOCK_SIZE):
        cells = start + tl.arange(0, BLOCK_SIZE)
        pointers = map_pointer + cells // columns * row_stride + cells % columns * column_stride
        value = tl.load(pointers, mask=cells < rows * columns, other=float("inf")).to(tl.float32)
        is_finite = tl.abs(value) < float("inf")  # false for NaN
        low = tl.minimum(low, tl.where(is_finite, value, float("inf")))
        high = tl.maximum(high, tl.where(is_finite, value, -float("inf")))
    return tl.min(low, axis=0), tl.max(high, axis=0)


@triton.jit
def select_patches(
    image,
    confidence,
    map_pointer,
    map_row_stride,
    map_column_stride,
    map_rows,
    map_columns,
    indices_pointer,
    counts_pointer,
    confidence_pointer,
    saliency_pointer,
    rows,
    columns,
    tau,
    gamma,
    min_keep,
    NORMALISE: tl.constexpr,
    BLOCK_SIZE_PATCH: tl.constexpr,
):
    """Resize one image's map, of shape [map_rows, map_columns], and write everything that select_tokens returns.

    The other pointers are those of :func:`select_from_saliency_kernel`.
    """
    num_patches = rows * columns
    indices_pointer += image * num_patches
    saliency_pointer += image * num_patches
    count = keep_count(confidence, num_patches, tau, gamma, min_keep)
    tl.store(confidence_pointer + image, confidence)
    tl.store(counts_pointer + image, count)

    patches = tl.arange(0, BLOCK_SIZE_PATCH)
    mask = patches < num_patches
    top, bottom, row_share = bilinear_neighbours(patches // columns, rows, map_rows)
    left, right, column_share = bilinear_neighbours(patches % columns, columns, map_columns)
    top_pointer = map_pointer + top * map_row_stride
    bottom_pointer = map_pointer + bottom * map_row_stride
    top_left = tl.load(top_pointer + left * map_column_stride, mask=mask).to(tl.float32)
    top_right = tl.load(top_pointer + right * map_column_stride, mask=mask).to(tl.float32)
    bottom_left = tl.load(bottom_pointer + left * map_column_stride, mask=mask).to(tl.float32)
    bottom_right = tl.load(bottom_pointer + right * map_column_stride, mask=mask).to(tl.float32)
    above = (1.0 - column_share) * top_left + column_share * top_right
    below = (1.0 - column_share) * bottom_left + column_share * bottom_right
    saliency = (1.0 - row_share) * above + row_share * below
    if NORMALISE:
        low, high = finite_range(
            map_pointer, map_row_stride, map_column_stride, map_rows, map_columns, BLOCK_SIZE_PATCH
        )
        share = tl.div_rn(tl.minimum(tl.maximum(saliency, low), high) - low, high - low)
        share = tl.where(high > low, share, 0.0)
        tl.store(saliency_pointer + patches, tl.where(saliency != saliency, saliency, share), mask=mask)
    else:
        tl.store(saliency_pointer + patches, saliency, mask=mask)

    # Integers in the order of the scores: NaN as -inf, both zeros equal, negative numbers reversed; padding below all.
    scores = tl.where(saliency != saliency, -float("inf"), tl.where(saliency == 0.0, 0.0, saliency))
    bits = scores.to(tl.int32, bitcast=True)
    keys = tl.where(mask, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    # The count-th greatest key, bit by bit from the sign: the greatest number that at least `count` keys reach.
    threshold = tl.full((), -0x80000000, tl.int32)
    bit = tl.full((), -0x80000000, tl.int32)
    for _ in range(32):
        raised = threshold ^ bit
        threshold = tl.where(tl.sum((keys >= raised).to(tl.int32), axis=0) >= count, raised, threshold)
        bit = (bit >> 1) & 0x7FFFFFFF
    above = (keys > threshold).to(tl.int32)
    ties = (keys == threshold).to(tl.int32)
    wins_tie = ties * (tl.cumsum(ties, axis=0) <= count - tl.sum(above, axis=0)).to(tl.int32)
    kept = tl.where(count > 0, above + wins_tie, 0)
    tl.store(indices_pointer + tl.cumsum(kept, axis=0) - kept, patches, mask=mask & (kept != 0))
    tl.store(indices_pointer + patches, -1, mask=mask & (patches >= count))


# Integers that equal 1 or divide by 16 in one model and not in the next need no kernel of their own.
@triton.jit(do_not_specialize=["num_classes", "map_rows", "map_columns", "rows", "columns"])
def select_from_saliency_kernel(
    logits_pointer,
    map_pointer,
    indices_pointer,
    counts_pointer,
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
    rows,
    columns,
    tau,
    gamma,
    min_keep,
    NORMALISE: tl.constexpr,
    BLOCK_SIZE_CLASS: tl.constexpr,
    BLOCK_SIZE_PATCH: tl.constexpr,
):
    """Select patches by a saliency map.

    Args:
        logits_pointer: of shape [batch, num_classes].
        map_pointer: saliency as it was given, of shape [batch, map_rows, map_columns].
        indices_pointer: kept patches in raster order, then -1; contiguous, of shape [batch, rows * columns].
        counts_pointer: number of kept patches, 0 for an exit; of shape [batch].
        confidence_pointer: max softmax, of shape [batch].
        saliency_pointer: the resized map, normalised if NORMALISE; contiguous, of shape [batch, rows, columns].
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


def block_sizes(num_classes: int, num_patches: int) -> dict[str, int]:
    """A tile of classes, and one of all patches."""
    return {
        "BLOCK_SIZE_CLASS": min(triton.next_power_of_2(num_classes), 2048),
        "BLOCK_SIZE_PATCH": triton.next_power_of_2(num_patches),
    }


def launch(
    logits: Tensor,
    saliency: Tensor,
    grid_size: tuple[int, int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ops.select_from_saliency`."""
    selection = empty_selection(logits, grid_size)
    if len(logits) == 0:
        return selection
    with torch.cuda.device_of(logits):
        select_from_saliency_kernel[(len(logits),)](
            logits,
            saliency,
            *selection,
            *logits.stride(),
            *saliency.stride(),
            logits.shape[1],
            *saliency.shape[1:],
            *grid_size,
            1.0 if tau is None else tau,  # no confidence is above 1
            gamma,
            min_keep,
            normalise,
            **block_sizes(logits.shape[1], grid_size[0] * grid_size[1]),
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return selection
