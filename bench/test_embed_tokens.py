"""Benchmark of ``embed_tokens``, from pixels to packed tokens, at the width of ViT-B."""

import torch
import torch.nn.functional as F
from measure import kept_indices, randn, size_of

from tinydrop_kernels import ops

DIM = 768
PATCH_SIZES = {14: 16, 24: 16, 37: 14}


def user(images, weight, bias, prefix, pos_embed, kept):
    """Embed every patch, then gather the kept ones, ``(batch, prefix + kept, dim)``. All images keep equally many."""
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos_embed
    tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.cat((prefix.expand(len(tokens), -1, -1), tokens), dim=1)


def test_embed_tokens(case, compare):
    patch = PATCH_SIZES[case.grid[0]]
    weight = randn(DIM, 3, patch, patch) / (3 * patch**2) ** 0.5
    bias, prefix, pos_embed = randn(DIM), randn(1, DIM), randn(case.num_patches, DIM)
    counts = torch.full_like(kept_indices(case)[:, 0], case.kept)
    (cu_seqlens, _, total, _), _ = ops.pack(counts, torch.zeros_like(counts), [(1, 1)], 1)

    def make_arguments():
        indices = kept_indices(case)
        images = randn(case.batch, 3, case.grid[0] * patch, case.grid[1] * patch)
        return images, indices, indices[:, : case.kept].long()

    def own(images, indices, kept):
        return ops.embed_tokens(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total)

    def eager(images, indices, kept):
        return user(images, weight, bias, prefix, pos_embed, kept)

    num_kept = case.batch * case.kept
    element = weight.element_size()
    pixels, out = num_kept * 3 * patch**2 * element, total * DIM * element
    moved_bytes = pixels + out + size_of(weight, bias, prefix, pos_embed, cu_seqlens) + 4 * num_kept
    compare("embed_tokens", own, eager, make_arguments, moved_bytes, flops=2 * num_kept * weight.numel())
