"""Benchmark of ``gather_tokens``, from embedded to packed tokens, at the width of ViT-B."""

import torch
from measure import kept_indices, randn, size_of

from tinydrop_kernels import ops

DIM = 768


def user(tokens, prefix, kept):
    """Gather the kept patches, ``(batch, prefix + kept, dim)``. All images keep equally many."""
    tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat((prefix, tokens), dim=1)


def test_gather_tokens(case, compare):
    prefix = randn(1, 1, DIM).expand(case.batch, -1, -1)
    counts = torch.full_like(kept_indices(case)[:, 0], case.kept)
    (cu_seqlens, _, total, _), _ = ops.pack(counts, torch.zeros_like(counts), [(1, 1)], 1)

    def make_arguments():
        indices = kept_indices(case)
        return randn(case.batch, case.num_patches, DIM), indices, indices[:, : case.kept].long()

    def own(tokens, indices, kept):
        return ops.gather_tokens(tokens, prefix, indices, cu_seqlens, total)

    def eager(tokens, indices, kept):
        return user(tokens, prefix, kept)

    num_kept = case.batch * case.kept
    rows = (num_kept + total) * DIM * prefix.element_size()
    compare("gather_tokens", own, eager, make_arguments, rows + size_of(prefix[0], cu_seqlens) + 4 * num_kept)
