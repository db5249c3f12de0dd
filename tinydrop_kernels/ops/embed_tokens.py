"""Packed tokens straight from pixels."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.backend import wants_gradient
from tinydrop_kernels.ops.library import register


def _fake(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total, summary):
    return images.new_empty(total, weight.shape[0])


_op = register(
    "embed_tokens(Tensor images, Tensor weight, Tensor? bias, Tensor prefix, Tensor? pos_embed, Tensor indices, "
    "Tensor cu_seqlens, SymInt total, bool summary) -> Tensor",
    _fake,
    reference.embed_tokens,
)


def embed_tokens(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
    summary: bool,
) -> Tensor:
    """Packed tokens straight from pixels: the patch embedding of the kept patches only.

    The patch embedding is a convolution whose stride is its kernel, hence linear in the pixels of one patch. The
    summary token is the mean of the dropped patches' embeddings, positions included; being linear, it is computed as
    the embedding of their mean pixels plus the mean of their positional embeddings.

    Args:
        images: floating ``(batch, channels, height, width)``, any strides. Pixels beyond the last whole patch are not
            used, as in the convolution.
        weight: ``(dim, channels, patch_height, patch_width)``.
        bias: ``(dim,)`` or None.
        prefix: ``(num_prefix_tokens, dim)``, positions already added; may have no rows.
        pos_embed: ``(T, dim)`` or None.
        indices, cu_seqlens, total: from :func:`select_tokens` and :func:`pack`.
        summary: as given to :func:`pack`.

    Returns:
        ``(total, dim)``.
    """
    arguments = (images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total, summary)
    return (reference.embed_tokens if wants_gradient(*arguments[:5]) else _op)(*arguments)


@register_flop_formula(torch.ops.tinydrop.embed_tokens, get_raw=True)
def _flops(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total, summary, out_val=None) -> int:
    """The projection of the rows that are not prefix tokens."""
    staying = (cu_seqlens.diff() > 0).sum().item()
    return 2 * weight.numel() * (total - staying * prefix.shape[0])
