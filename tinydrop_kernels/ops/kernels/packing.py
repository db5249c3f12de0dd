"""The kernel of ``pack``: the first row of each image's segment, with images of one level as neighbours."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.launcher import Launcher


# Do not specialise, because the batch changes from call to call; otherwise the kernel would recompile.
@triton.jit(
    do_not_specialize=["batch", "num_levels", "num_prefix_tokens"],
    do_not_specialize_on_alignment=["counts_pointer", "levels_pointer"],
)
def pack_kernel(
    counts_pointer,
    levels_pointer,
    order_pointer,
    cu_seqlens_pointer,
    sizes_pointer,
    batch,
    num_levels,
    num_prefix_tokens,
    BLOCK_SIZE: tl.constexpr,
):
    """Sort the images of a batch by level and compute where their segments begin.

    Args:
        counts_pointer: kept patches, 0 for an image that exits; of shape [batch].
        levels_pointer: level of each image's own grid, of shape [batch].
        order_pointer: output, the images sorted by level, exited images last; of shape [batch].
        cu_seqlens_pointer: output, first row of each segment in that order, then the total; of shape [batch + 1].
        sizes_pointer: output: longest segment, total, images of each level, rows of each level; of shape
            [2 + 2 * num_levels].
        batch: number of images.
        num_levels: number of grids.
        num_prefix_tokens: rows of every segment in front of its patches.
        BLOCK_SIZE: images in a tile.
    """
    # One program processes the whole batch in tiles, because each prefix sum needs the one before.
    longest = tl.zeros((BLOCK_SIZE,), tl.int32)
    total = 0
    placed = 0
    level = 0
    while level <= num_levels:  # the last level holds exited images
        level_images = placed
        level_rows = total
        for start in range(0, batch, BLOCK_SIZE):
            images = start + tl.arange(0, BLOCK_SIZE)
            live = images < batch
            counts = tl.load(counts_pointer + images, mask=live, other=0)
            own_level = tl.load(levels_pointer + images, mask=live, other=-1)
            own_level = tl.where((counts == 0) & live, num_levels, own_level)
            is_here = (own_level == level).to(tl.int32)
            seqlens = tl.where(counts > 0, counts + num_prefix_tokens, 0) * is_here
            # Exclusive sums, because these are right for masked lanes as well.
            place = placed + tl.cumsum(is_here, axis=0) - is_here
            first_row = total + tl.cumsum(seqlens, axis=0) - seqlens
            tl.store(order_pointer + place, images, mask=is_here != 0)
            tl.store(cu_seqlens_pointer + place, first_row, mask=is_here != 0)
            longest = tl.maximum(longest, seqlens)
            placed += tl.sum(is_here, axis=0)
            total += tl.sum(seqlens, axis=0)
        if level < num_levels:
            tl.store(sizes_pointer + 2 + level, placed - level_images)
            tl.store(sizes_pointer + 2 + num_levels + level, total - level_rows)
        level += 1
    tl.store(cu_seqlens_pointer + batch, total)
    tl.store(sizes_pointer, tl.max(longest, axis=0))
    tl.store(sizes_pointer + 1, total)


@functools.cache
def launcher_on(device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]) -> Launcher:
    """Return the launcher for these dtypes of counts and levels."""
    return Launcher(pack_kernel, device, dtypes, {"maxnreg": 128})  # otherwise the assembler takes 48 and spills


def launch(counts: Tensor, levels: Tensor, num_levels: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return order, cu_seqlens and sizes, from which :func:`ops.pack` makes its result."""
    batch = counts.shape[0]
    order, cu_seqlens = counts.new_empty(batch), counts.new_empty(batch + 1)
    sizes = counts.new_empty(2 + 2 * num_levels)
    tensors = (counts.contiguous(), levels.contiguous(), order, cu_seqlens, sizes)
    # Launch a single program. One tile of 512 images holds every usual batch.
    launcher_on(counts.device, (counts.dtype, levels.dtype))(
        (1, 1, 1), (*tensors, batch, num_levels, num_prefix_tokens, 512)
    )
    return order, cu_seqlens, sizes
