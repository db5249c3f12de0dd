"""Device functions that both selecting kernels use: confidence, the law, the resize and the ranking of one image.

One program makes all decisions for one image, so that a batch takes one launch and no read-back in between.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops import types

ROUNDING_SLACK = tl.constexpr(types.ROUNDING_SLACK)

# A batch rarely fills the GPU, so a program usually has a multiprocessor to itself and only its own warps hide latency.
# Eight warps are two for each of the four schedulers. Tiles of 16 elements a thread take at most 118 registers; 32
# elements took up to 252, and 16 warps spilled (ptxas, sm_80 to sm_100).
NUM_WARPS = 8
# Without this limit the assembler spills one or two registers on sm_100, for an occupancy that is of no use here.
MAX_REGISTERS = 255
OPTIONS = {"num_warps": NUM_WARPS, "maxnreg": MAX_REGISTERS}
TILE_SIZE = NUM_WARPS * 32 * 16


@triton.jit
def predict(logits_pointer, class_stride, num_classes, BLOCK_SIZE_CLASS: tl.constexpr):
    """Return max softmax and argmax of one image's logits, of shape [num_classes].

    Like torch.argmax, prefers the lower index among equal logits and treats NaN as the greatest.
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

    # Sum in a second pass over the row, which is cached now, because a single pass would subtract infinities in a tile
    # without finite logits.
    total = tl.zeros((BLOCK_SIZE_CLASS,), tl.float32)
    for start in range(0, num_classes, BLOCK_SIZE_CLASS):
        classes = start + tl.arange(0, BLOCK_SIZE_CLASS)
        logits = tl.load(logits_pointer + classes * class_stride, mask=classes < num_classes, other=-float("inf"))
        total += tl.exp(logits.to(tl.float32) - peak)
    # The peak adds exactly 1 to the sum, so the quotient, rounded to nearest, is never above 1.
    return tl.div_rn(1.0, tl.sum(total, axis=0)), predicted


@triton.jit
def apply_law(confidence, grids_pointer, tau, gamma, min_keep, coarsen, NUM_LEVELS: tl.constexpr):
    """Evaluate :func:`ops.apply_law` for one image.

    Returns:
        Number of patches to keep (0 for an exit), level, and rows and columns of the grid at that level.
    """
    ratio = confidence / tau
    power = tl.exp2(gamma * tl.log2(ratio))
    power = tl.where((gamma == 0.0) & (ratio == ratio), 1.0, power)  # also where the product is 0 * -inf
    power = tl.where(gamma == float("inf"), 0.0, power)  # also where the ratio is 1, or above it
    budget = tl.minimum(tl.maximum(1.0 - power, min_keep), 1.0)
    budget = tl.where(power == power, budget, 1.0)

    scale = tl.exp2(0.5 * coarsen * tl.log2(budget))
    rows = tl.load(grids_pointer)
    columns = tl.load(grids_pointer + 1)
    dense = (rows * columns).to(tl.float32)
    side = 1.0
    level = 0
    for smaller in tl.static_range(1, NUM_LEVELS):
        smaller_rows = tl.load(grids_pointer + 2 * smaller)
        smaller_columns = tl.load(grids_pointer + 2 * smaller + 1)
        smaller_side = tl.sqrt((smaller_rows * smaller_columns).to(tl.float32) / dense)
        is_nearer = scale < 0.5 * (side + smaller_side)
        rows = tl.where(is_nearer, smaller_rows, rows)
        columns = tl.where(is_nearer, smaller_columns, columns)
        level += is_nearer.to(tl.int32)
        side = smaller_side

    fraction = tl.exp2((1.0 - coarsen) * tl.log2(budget))
    count = tl.ceil(fraction * (rows * columns) - ROUNDING_SLACK).to(tl.int32)
    count = tl.minimum(tl.maximum(count, 1), rows * columns)
    return tl.where(confidence > tau, 0, count), level, rows, columns


@triton.jit
def bilinear_neighbours(place, size, map_size):
    """Return the two cells of the map between which a place of the resized axis lies, and its distance from the first.

    The rule is that of F.interpolate(align_corners=False). If the sizes are equal, no neighbour is read, which matters
    if the neighbour is NaN.
    """
    # Round to nearest, because Triton's own division can be an ulp off and make the scale of equal sizes less than 1.
    scale = tl.div_rn(map_size.to(tl.float32), size.to(tl.float32))
    # Fuse as PyTorch's compilers do, because the rounding decides whether a zero next to a salient cell stays a tie.
    source = tl.maximum(tl.fma(place.to(tl.float32) + 0.5, scale, -0.5), 0.0)
    low = tl.minimum(source.to(tl.int32), map_size - 1)
    high = tl.where(map_size == size, low, tl.minimum(low + 1, map_size - 1))
    return low, high, source - low.to(tl.float32)


@triton.jit
def finite_range(map_pointer, row_stride, column_stride, rows, columns, BLOCK_SIZE: tl.constexpr):
    """Return the least and the greatest finite cell of one image's map, of shape [rows, columns].

    The result is inf and -inf if no cell is finite.
    """
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
    NUM_LEVELS: tl.constexpr,
    BLOCK_SIZE_PATCH: tl.constexpr,
):
    """Resize one image's map, of shape [map_rows, map_columns], rank its patches, and write all of the selection.

    The other arguments are those of :func:`select_from_saliency_kernel`.
    """
    indices_pointer += image * patches_stride
    saliency_pointer += image * patches_stride
    count, level, rows, columns = apply_law(confidence, grids_pointer, tau, gamma, min_keep, coarsen, NUM_LEVELS)
    tl.store(confidence_pointer + image, confidence)
    tl.store(counts_pointer + image, count)
    tl.store(levels_pointer + image, level)

    patches = tl.arange(0, BLOCK_SIZE_PATCH)
    mask = patches < rows * columns
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
    tl.store(saliency_pointer + patches, tl.where(mask, saliency, 0.0), mask=patches < patches_stride)

    # Map the scores to integers of the same order. NaN ranks as -inf, both zeros are equal, and padding ranks last.
    scores = tl.where(saliency != saliency, -float("inf"), tl.where(saliency == 0.0, 0.0, saliency))
    bits = scores.to(tl.int32, bitcast=True)
    keys = tl.where(mask, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)
    # Find the count-th greatest key, which is the greatest number that at least `count` keys reach, two bits per round.
    # A round counts the keys that reach three thresholds in a single sum, because a sum's barriers take most of the
    # time. Three counts of up to 512 patches fit 32 bits, in which a warp's sum is one instruction.
    WIDTH: tl.constexpr = 10 if BLOCK_SIZE_PATCH <= 512 else 21
    PACKED: tl.constexpr = tl.int32 if BLOCK_SIZE_PATCH <= 512 else tl.int64
    threshold = tl.full((), -0x80000000, tl.int32)
    step = tl.full((), 0x40000000, tl.int32)
    for _ in range(16):
        low = threshold + step
        middle = low + step
        high = middle + step
        reached = (keys >= low).to(PACKED)
        reached += (keys >= middle).to(PACKED) << WIDTH
        reached += (keys >= high).to(PACKED) << 2 * WIDTH
        totals = tl.sum(reached, axis=0)
        threshold = tl.where(totals % (1 << WIDTH) >= count, low, threshold)
        threshold = tl.where((totals >> WIDTH) % (1 << WIDTH) >= count, middle, threshold)
        threshold = tl.where(totals >> 2 * WIDTH >= count, high, threshold)
        step = step >> 2
    above_it = (keys > threshold).to(tl.int32)
    ties = (keys == threshold).to(tl.int32)
    wins_tie = ties * (tl.cumsum(ties, axis=0) <= count - tl.sum(above_it, axis=0)).to(tl.int32)
    kept = tl.where(count > 0, above_it + wins_tie, 0)
    tl.store(indices_pointer + tl.cumsum(kept, axis=0) - kept, patches, mask=mask & (kept != 0))
    tl.store(indices_pointer + patches, -1, mask=(patches < patches_stride) & (patches >= count))


def block_sizes(num_classes: int, num_patches: int) -> dict[str, int]:
    """Return the sizes of a tile of classes and of a tile that holds all patches."""
    return {
        "BLOCK_SIZE_CLASS": min(triton.next_power_of_2(num_classes), 2048),
        "BLOCK_SIZE_PATCH": triton.next_power_of_2(num_patches),
    }


@functools.cache
def grids_on(device: torch.device, grid_sizes: tuple[int, ...]) -> Tensor:
    """Return the list of grids on the device. It is copied once."""
    with torch.inference_mode(False):
        return torch.tensor(grid_sizes, dtype=torch.int32, device=device)
