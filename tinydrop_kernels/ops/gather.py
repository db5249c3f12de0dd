"""Packed tokens from embedded ones."""

from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels.ops.registry import define, kernels, reference, triton, wants_gradient


def gather_tokens(tokens: Tensor, prefix: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Packed tokens from embedded ones, for stems that are no plain patch embedding.

    Args:
        tokens: patch tokens ``(segments, patches, dim)``, any strides.
        prefix: ``(segments, num_prefix_tokens, dim)``, any strides.
        indices, cu_seqlens, total: as in :func:`embed_tokens`.

    Returns:
        ``(total, dim)``.
    """
    run = _reference if wants_gradient(tokens, prefix) else _op
    return run(tokens, prefix, indices, cu_seqlens, total)


def packed_rows(kept: Tensor, segment: Tensor, place: Tensor, prefix: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Put kept patches and prefix rows in their places: ``(total, dim)``, in plain PyTorch.

    Args:
        kept: ``(kept, dim)``.
        segment, place: int64 ``(kept,)``: the segment of each, and its place among the segment's patches.
        prefix: ``(num_prefix_tokens, dim)``, or ``(segments, num_prefix_tokens, dim)``.
        cu_seqlens, total: as in :func:`embed_tokens`.
    """
    num_prefix_tokens = prefix.shape[-2]
    starts = cu_seqlens[:-1].long()
    out = kept.new_empty(total, kept.shape[1])
    out[starts[segment] + num_prefix_tokens + place] = kept
    if num_prefix_tokens:
        staying = (cu_seqlens.diff() > 0).nonzero()[:, 0]
        rows = prefix.expand(len(starts), -1, -1)[staying].to(out.dtype)
        out[starts[staying, None] + torch.arange(num_prefix_tokens, device=out.device)] = rows
    return out


def _reference(tokens: Tensor, prefix: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    segment, place = (indices >= 0).nonzero(as_tuple=True)
    kept = tokens[segment, indices[segment, place].long()]
    return packed_rows(kept, segment, place, prefix, cu_seqlens, total)


def _triton(*arguments: Any) -> Tensor:
    return kernels("gather").launch(*arguments)  # type: ignore[no-any-return]


_op = define(
    "gather_tokens(Tensor tokens, Tensor prefix, Tensor indices, Tensor cu_seqlens, SymInt total) -> Tensor",
    lambda tokens, prefix, indices, cu_seqlens, total: tokens.new_empty(total, tokens.shape[2]),
    [triton(_triton), reference(_reference)],
)
