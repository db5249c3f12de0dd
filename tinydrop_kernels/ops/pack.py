"""The layout of a ragged batch, and the one read back from the device."""

import torch
from torch import Tensor

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.library import register


def _fake(counts, num_patches, num_prefix_tokens, summary):
    batch = counts.shape[0]
    return counts.new_empty(batch + 1, dtype=torch.int32), counts.new_empty(2, dtype=torch.int32)


_op = register(
    "pack(Tensor counts, SymInt num_patches, SymInt num_prefix_tokens, bool summary) -> (Tensor, Tensor)",
    _fake,
    reference.pack,
)


def pack(counts: Tensor, num_patches: int, num_prefix_tokens: int, summary: bool) -> tuple[Tensor, int, int]:
    """Lay the kept tokens of a batch behind one another.

    Reads two numbers back from the device, in one copy: the only synchronisation of a batch.

    Args:
        counts: int32 ``(batch,)``, ``batch >= 1``.
        num_patches: patch tokens of one image.
        num_prefix_tokens: rows that every image that does not exit brings in front of its patches.
        summary: one more row for the dropped patches, where there are any.

    Returns:
        ``cu_seqlens`` int32 ``(batch + 1,)``, ``max_seqlen`` and ``total``.
    """
    cu_seqlens, sizes = _op(counts, num_patches, num_prefix_tokens, summary)
    max_seqlen, total = sizes.tolist()
    return cu_seqlens, max_seqlen, total
