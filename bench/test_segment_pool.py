"""Benchmark of ``segment_pool``: mean over each segment without its class token, at the width of ViT-B."""

import torch
from measure import DEVICE, randn, size_of

from tinydrop_kernels import ops

DIM = 768


def user(tokens, lengths):
    """Return the mean of each segment after its class token, without a loop over the batch.

    Unlike the operator, it does not handle segments without rows, and a NaN in a class token spreads to the mean.
    """
    segment = torch.repeat_interleave(
        torch.arange(len(lengths), device=tokens.device), lengths, output_size=len(tokens)
    )
    sums = torch.zeros(len(lengths), tokens.shape[1], device=tokens.device).index_add_(0, segment, tokens.float())
    first = tokens[lengths.cumsum(0) - lengths]
    return ((sums - first) / (lengths - 1)[:, None]).to(tokens.dtype)


def test_segment_pool(case, compare):
    # Lengths differ, as they do after exits and with most policies. Their mean is that of the case.
    spread = torch.linspace(0.5, 1.5, case.batch) if case.batch > 1 else torch.ones(1)
    lengths = ((case.kept * spread).int() + 1).to(DEVICE)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
    total = int(cu_seqlens[-1])
    lengths = lengths.long()

    def make_arguments():
        return (randn(total, DIM),)

    def own(tokens):
        return ops.segment_pool(tokens, cu_seqlens, "mean", 1)

    def eager(tokens):
        return user(tokens, lengths)

    (tokens,) = make_arguments()
    # The class tokens' rows need not be read, but are counted.
    moved_bytes = size_of(tokens, cu_seqlens) + case.batch * DIM * tokens.element_size()
    compare("segment_pool", own, eager, make_arguments, moved_bytes)
