"""The operator ``gather_tokens``: packed tokens from patches that are already embedded."""

from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels.ops.registry import define, kernels, reference, triton, wants_gradient


def gather_tokens(tokens: Tensor, prefix: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Copy the kept patch tokens of each image into one packed tensor, behind the prefix tokens of their image.

    It serves models whose stem is not a plain patch embedding; otherwise :func:`embed_tokens` does less work.

    Args:
        tokens: patch tokens ``(segments, patches, dim)``, any strides.
        prefix: ``(segments, num_prefix_tokens, dim)``, any strides.
        indices, cu_seqlens, total: as in :func:`embed_tokens`.

    Returns:
        ``(total, dim)``.

    Example:
        >>> tokens, prefix = torch.arange(8.0).view(2, 4, 1), torch.full((2, 1, 1), -1.0)
        >>> indices = torch.tensor([[1, 3], [0, -1]]).int()
        >>> cu_seqlens = torch.tensor([0, 3, 5]).int()
        >>> ops.gather_tokens(tokens, prefix, indices, cu_seqlens, total=5)[:, 0].tolist()
        [-1.0, 1.0, 3.0, -1.0, 4.0]
    """
    run = _reference if wants_gradient(tokens, prefix) else _op
    return run(tokens, prefix, indices, cu_seqlens, total)


def _reference(tokens: Tensor, prefix: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Gather segment by segment. Each row is copied once, or twice while autograd records."""
    lengths, first, prefix = cu_seqlens.diff().tolist(), prefix.shape[1], prefix.to(tokens.dtype)
    kept = [row[: max(length - first, 0)] for row, length in zip(indices, lengths, strict=True)]
    segments = zip(prefix, tokens, kept, strict=True)
    if wants_gradient(tokens, prefix):
        moved = (rows for own, patches, row in segments if len(row) for rows in (own, patches.index_select(0, row)))
        return torch.cat([tokens.new_empty(0, tokens.shape[2]), *moved])
    out = tokens.new_empty(total, tokens.shape[2])
    for rows, (own, patches, row) in zip(out.split(lengths), segments, strict=True):
        if len(row):
            rows[:first] = own
            torch.index_select(patches, 0, row, out=rows[first:])
    return out


def _triton(*arguments: Any) -> Tensor:
    return kernels("gather").launch(*arguments)  # type: ignore[no-any-return]


_op = define(
    "gather_tokens(Tensor tokens, Tensor prefix, Tensor indices, Tensor cu_seqlens, SymInt total) -> Tensor",
    lambda tokens, prefix, indices, cu_seqlens, total: tokens.new_empty(total, tokens.shape[2]),
    [triton(_triton), reference(_reference)],
)
