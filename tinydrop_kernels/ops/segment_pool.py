"""One row for each segment."""

from torch import Tensor

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.backend import wants_gradient
from tinydrop_kernels.ops.library import register

MODES = ("first", "mean", "max")


def _fake(tokens, cu_seqlens, mode, skip):
    return tokens.new_empty(cu_seqlens.shape[0] - 1, tokens.shape[1])


_op = register(
    "segment_pool(Tensor tokens, Tensor cu_seqlens, str mode, SymInt skip) -> Tensor",
    _fake,
    reference.segment_pool,
)


def segment_pool(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int = 0) -> Tensor:
    """Reduce each segment to one row.

    Args:
        tokens: ``(total, dim)``.
        cu_seqlens: int32 ``(batch + 1,)``.
        mode: ``"first"``, ``"mean"`` or ``"max"``.
        skip: rows at the head of each segment that do not take part.

    Returns:
        ``(batch, dim)``; zeros for a segment with no rows left. Means are accumulated in float32.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, accepted are {', '.join(MODES)}")
    run = reference.segment_pool if wants_gradient(tokens) else _op
    return run(tokens, cu_seqlens, mode, skip)
