"""The arguments of the registered varlen_attention, by name."""

from typing import NamedTuple

from torch import Tensor


class AttentionArguments(NamedTuple):
    """As every implementation takes them, in this order; what they mean: :func:`ops.varlen_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float | None = None
    bias_table: Tensor | None = None
    positions: Tensor | None = None
    grid_size: tuple[int, int] = (1, 1)
