"""From embedded to packed tokens, at ViT-B's width."""

import torch
from measure import kept_indices, ops, randn, size_of

DIM = 768


def user(tokens, prefix, pos_embed, kept):
    """Gather, then add the positions of what was gathered: (batch, prefix + kept, dim)."""
    tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2])) + pos_embed[kept]
    return torch.cat((prefix.expand(len(tokens), -1, -1), tokens), dim=1)


def test_gather_tokens(case, compare):
    prefix, pos_embed = randn(1, DIM), randn(case.num_patches, DIM)
    cu_seqlens, _, total = ops.pack(torch.full_like(kept_indices(case)[:, 0], case.kept), case.num_patches, 1, False)

    def make_arguments():
        indices = kept_indices(case)
        return randn(case.batch, case.num_patches, DIM), indices, indices[:, : case.kept].long()

    def own(tokens, indices, kept):
        return ops.gather_tokens(tokens, prefix, pos_embed, indices, cu_seqlens, total, False)

    def eager(tokens, indices, kept):
        return user(tokens, prefix, pos_embed, kept)

    num_kept = case.batch * case.kept
    rows = (num_kept + total) * DIM * prefix.element_size()
    compare("gather_tokens", own, eager, make_arguments, rows + size_of(prefix, pos_embed, cu_seqlens) + 4 * num_kept)
