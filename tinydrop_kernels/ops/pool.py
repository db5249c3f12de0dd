"""The operator ``segment_pool``: one row for each segment."""

from itertools import pairwise
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
        skip: number of rows at the start of each segment to leave out.

    Returns:
        ``(segments, dim)``; zeros for a segment with no rows left. Means are accumulated in float32 (float64 for
        float64).

    Raises:
        ValueError: ``mode`` is none of these.

    Example:
        >>> tokens, cu_seqlens = torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 2, 3]).int()
        >>> ops.segment_pool(tokens, cu_seqlens, "mean").tolist()
        [[2.0], [5.0]]
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    run = _reference if wants_gradient(tokens) else _op
    return run(tokens, cu_seqlens, mode, skip)


def _reference(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int) -> Tensor:
    """Pool segment by segment. On CPU this is about as fast as one ``index_add``, and faster for one segment."""
    starts, sizes = cu_seqlens.tolist(), []
    for length in (end - start for start, end in pairwise(starts)):
        sizes += [min(skip, length), max(length - skip, 0)]
    segments = tokens.split([*sizes, len(tokens) - starts[-1]])[1::2]  # without the skipped rows
    if not segments:
        return tokens.new_empty(0, tokens.shape[1])
    if mode == "mean":
        exact = torch.promote_types(tokens.dtype, torch.float32)
        sums = torch.stack([rows.sum(dim=0, dtype=exact) for rows in segments])
        return (sums / torch.tensor(sizes[1::2], device=tokens.device).clamp_(min=1)[:, None]).to(tokens.dtype)
    filled = [rows if len(rows) else rows.new_zeros(1, rows.shape[1]) for rows in segments]
    return torch.stack([rows[0] if mode == "first" else rows.amax(dim=0) for rows in filled])


def _triton(*arguments: Any) -> Tensor:
    return kernels("pool").launch(*arguments)  # type: ignore[no-any-return]


_op = define(
    "segment_pool(Tensor tokens, Tensor cu_seqlens, str mode, SymInt skip) -> Tensor",
    lambda tokens, cu_seqlens, mode, skip: tokens.new_empty(cu_seqlens.shape[0] - 1, tokens.shape[1]),
    [triton(_triton), reference(_reference)],
)
