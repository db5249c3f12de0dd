"""Attention over packed segments."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.library import register


def _fake(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_op = register(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None) -> Tensor",
    _fake,
    CPU=reference.varlen_attention,
    CUDA=reference.varlen_attention,
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
    """See :func:`reference.varlen_attention`. Where gradients are wanted, the reference itself runs."""
    arguments = (query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return reference.varlen_attention(*arguments)
    return _op(*arguments)


@register_flop_formula(torch.ops.tinydrop.varlen_attention, get_raw=True)
def _flops(query, key, value, cu_seqlens_q, cu_seqlens_k, *args, out_val=None, **kwargs) -> int:
    """Two products of 2 * head_dim FLOPs for each pair of query and key of a segment."""
    pairs = (cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum().item()
    return 4 * pairs * query.shape[1] * query.shape[2]
