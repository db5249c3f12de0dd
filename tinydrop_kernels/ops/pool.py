"""One row for each segment."""

from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels.ops.registry import define, kernels, reference, triton, wants_gradient

MODES = ("first", "mean", "max")


def segment_pool(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int = 0) -> Tensor:
    """Reduce each segment to one row.

    Args:
        tokens: ``(total, dim)``.
        cu_seqlens: int32 ``(segments + 1,)``.
        mode: ``"first"``, ``"mean"`` or ``"max"``.
        skip: rows at the head of each segment that do not take part.

    Returns:
        ``(segments, dim)``; zeros for a segment with no rows left. Means are accumulated in float32 (float64 for
        float64).

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    run = _reference if wants_gradient(tokens) else _op
    return run(tokens, cu_seqlens, mode, skip)


def _reference(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int) -> Tensor:
    segments = len(cu_seqlens) - 1
    starts = cu_seqlens[:-1].long() + skip
    lengths = (cu_seqlens[1:] - starts).clamp(min=0)
    empty = (lengths == 0)[:, None]
    if mode == "first":
        rows = tokens[starts.clamp(max=len(tokens) - 1)] if len(tokens) else tokens.new_zeros(segments, tokens.shape[1])
        return rows.masked_fill(empty, 0)
    position = torch.arange(len(tokens), device=tokens.device)
    segment = torch.searchsorted(cu_seqlens[1:], position, right=True).clamp(max=segments - 1)
    inside = (position >= starts[segment]) & (position < cu_seqlens[segment + 1])  # others lie behind the last segment
    segment, tokens = segment[inside], tokens[inside]
    if mode == "mean":
        exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        total = exact.new_zeros(segments, tokens.shape[1]).index_add_(0, segment, exact)
        return (total / lengths.clamp(min=1)[:, None]).to(tokens.dtype)
    pooled = tokens.new_full((segments, tokens.shape[1]), float("-inf"))
    pooled = pooled.scatter_reduce_(0, segment[:, None].expand_as(tokens), tokens, "amax")
    return pooled.masked_fill(empty, 0)


def _triton(*arguments: Any) -> Tensor:
    return kernels("pool").launch(*arguments)  # type: ignore[no-any-return]


_op = define(
    "segment_pool(Tensor tokens, Tensor cu_seqlens, str mode, SymInt skip) -> Tensor",
    lambda tokens, cu_seqlens, mode, skip: tokens.new_empty(cu_seqlens.shape[0] - 1, tokens.shape[1]),
    [triton(_triton), reference(_reference)],
)
