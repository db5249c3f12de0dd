"""The operator ``embed_tokens``: packed tokens from the pixels of kept patches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops.registry import define, kernels, reference, triton, wants_gradient


def embed_tokens(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
) -> Tensor:
    """Embed only the kept patches of each image and return them packed, behind the prefix tokens of their image.

    The patch embedding is a convolution whose stride equals its kernel size. Each patch is therefore computed from its
    own pixels only, and dropped patches need no computation.

    Args:
        images: floating ``(segments, channels, height, width)``, any strides. Pixels beyond the last whole patch
            are not used, as in the convolution.
        weight: ``(dim, channels, patch_height, patch_width)``.
        bias: ``(dim,)`` or None.
        prefix: ``(num_prefix_tokens, dim)``, positions already added; may have no rows.
        pos_embed: ``(patches, dim)`` or None.
        indices: int32 ``(segments, n)``: kept patches in any order, then -1. ``n`` is at least the largest count.
        cu_seqlens: int32 ``(segments + 1,)``, counting prefix tokens and kept patches. A segment without kept patches
            has no rows at all.
        total: rows of all segments.

    Returns:
        ``(total, dim)``.

    Example:
        >>> images, weight, prefix = torch.randn(2, 3, 4, 4), torch.randn(8, 3, 2, 2), torch.randn(1, 8)
        >>> indices = torch.tensor([[0, 3, -1, -1], [1, 2, 3, -1]]).int()  # 2 and 3 of the 4 patches
        >>> cu_seqlens = torch.tensor([0, 3, 7]).int()
        >>> ops.embed_tokens(images, weight, None, prefix, None, indices, cu_seqlens, total=7).shape
        torch.Size([7, 8])
    """
    arguments = (images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total)
    return (_reference if wants_gradient(*arguments[:5]) else _op)(*arguments)


def _reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
) -> Tensor:
    patch_height, patch_width = weight.shape[-2:]
    patches = images.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # a view: (segments, rows, columns, channels, height and width of one)
    columns = patches.shape[2]
    segment, place = (indices >= 0).nonzero(as_tuple=True)
    patch = indices[segment, place].long()
    kept = F.linear(patches[segment, patch // columns, patch % columns].flatten(1), weight.flatten(1), bias)
    if pos_embed is not None:
        kept = kept + pos_embed[patch]
    prefix = prefix.to(kept.dtype)
    segments = kept.split([max(length - len(prefix), 0) for length in cu_seqlens.diff().tolist()])
    return torch.cat([kept[:0], *(rows for own in segments if len(own) for rows in (prefix, own))])


def _triton(*arguments: Any) -> Tensor:
    return kernels("embed").launch(*arguments)  # type: ignore[no-any-return]


_op = define(
    "embed_tokens(Tensor images, Tensor weight, Tensor? bias, Tensor prefix, Tensor? pos_embed, Tensor indices, "
    "Tensor cu_seqlens, SymInt total) -> Tensor",
    lambda images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total: images.new_empty(
        total, weight.shape[0]
    ),
    [triton(_triton), reference(_reference)],
)


@register_flop_formula(torch.ops.tinydrop.embed_tokens, get_raw=True)
def _flops(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
    out_val: Tensor | None = None,
) -> int:
    """Count the projection of all rows that are not prefix tokens."""
    staying = int((cu_seqlens.diff() > 0).sum())
    return 2 * weight.numel() * (total - staying * prefix.shape[0])
