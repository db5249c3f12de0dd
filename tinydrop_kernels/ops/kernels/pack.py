"""Where each image's segment begins in the packed batch."""

import torch
import triton
import triton.language as tl
from torch import Tensor


# The batch changes from call to call and must not compile anew.
@triton.jit(do_not_specialize=["batch", "num_patches", "num_prefix_tokens"])
def pack_kernel(
    counts_pointer,
    cu_seqlens_pointer,
    sizes_pointer,
    batch,
    num_patches,
    num_prefix_tokens,
    summary: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Lay the kept tokens of a batch behind one another.

    Args:
        counts_pointer: kept patches, 0 for an image that exits; of shape [batch].
        cu_seqlens_pointer: where each segment begins, and the total at the end; of shape [batch + 1].
        sizes_pointer: longest segment and total, of shape [2].
    """
    # This program processes the whole batch, in tiles: a sum from the first image on has no use for a second program.
    longest = tl.zeros((BLOCK_SIZE,), tl.int32)
    total = 0
    for start in range(0, batch, BLOCK_SIZE):
        images = start + tl.arange(0, BLOCK_SIZE)
        counts = tl.load(counts_pointer + images, mask=images < batch, other=0)
        seqlens = tl.where(counts > 0, counts + num_prefix_tokens, 0)
        if summary:
            seqlens += ((counts > 0) & (counts < num_patches)).to(tl.int32)
        # Exclusive, so that masked lanes need no care; the total, which it lacks, is stored after the loop.
        tl.store(cu_seqlens_pointer + images, total + tl.cumsum(seqlens, axis=0) - seqlens, mask=images < batch)
        longest = tl.maximum(longest, seqlens)
        total += tl.sum(seqlens, axis=0)
    tl.store(cu_seqlens_pointer + batch, total)
    tl.store(sizes_pointer, tl.max(longest, axis=0))
    tl.store(sizes_pointer + 1, total)


def launch(counts: Tensor, num_patches: int, num_prefix_tokens: int, summary: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ops.pack`."""
    batch = len(counts)
    cu_seqlens = counts.new_empty(batch + 1, dtype=torch.int32)
    sizes = counts.new_empty(2, dtype=torch.int32)
    with torch.cuda.device_of(counts):
        # Launches a single program; one tile holds every usual batch.
        pack_kernel[(1,)](
            counts.contiguous(), cu_seqlens, sizes, batch, num_patches, num_prefix_tokens, summary, BLOCK_SIZE=512
        )
    return cu_seqlens, sizes
