"""Softmax attention within each segment of a packed batch."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.backend import wants_gradient
from tinydrop_kernels.ops.library import register


def _fake(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_op = register(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None) -> Tensor",
    _fake,
    reference.varlen_attention,
)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention within each segment; segments do not see one another.

    An empty segment has no rows; queries of a segment without keys yield zeros. On CPU, one
    ``scaled_dot_product_attention`` a segment is the fastest that was measured (docs/decisions.md).

    Args:
        query: ``(total_q, heads, head_dim)``, any strides.
        key, value: ``(total_k, heads, head_dim)``, any strides.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``.
        max_seqlen_q, max_seqlen_k: longest segment.
        scale: factor on the scores, ``head_dim ** -0.5`` by default.

    Returns:
        ``(total_q, heads, head_dim)``, contiguous.
    """
    arguments = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    return (reference.varlen_attention if wants_gradient(query, key, value) else _op)(*arguments)


@register_flop_formula(torch.ops.tinydrop.varlen_attention, get_raw=True)
def _flops(query, key, value, cu_seqlens_q, cu_seqlens_k, *args, out_val=None, **kwargs) -> int:
    """Two products of 2 * head_dim FLOPs for each pair of query and key of a segment."""
    pairs = (cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum().item()
    return 4 * pairs * query.shape[1] * query.shape[2]
