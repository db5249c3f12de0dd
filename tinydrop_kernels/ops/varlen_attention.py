"""Softmax attention within each segment of a packed batch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops import attention_backends, reference
from tinydrop_kernels.ops.backend import wants_gradient
from tinydrop_kernels.ops.library import define


class RelativeBias(NamedTuple):
    """A relative position bias, as BEiT and Swin add it to the scores; looked up in the kernel, never materialised.

    The row of ``table`` for a query and a key is :func:`reference.relative_position_index` of their positions.
    """

    table: Tensor  # floating (distances, heads), any strides; (2 rows - 1)(2 columns - 1) distances, 3 more for BEiT's
    positions: Tensor  # int32 (total,): each packed row's patch on the grid, in raster order; negative: the class
    # token, for which the table must have its three entries. Not checked: looking would synchronise
    grid_size: tuple[int, int]  # rows and columns of the patch grid


def _fake(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None, *bias):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_op = define(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None, Tensor? bias_table=None, Tensor? positions=None, "
    "SymInt[2] grid_size=1) -> Tensor",
    _fake,
    attention_backends.dispatch,
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
    bias: RelativeBias | None = None,
) -> Tensor:
    """``softmax(scale * query @ key.T + bias) @ value`` within each segment; segments do not see one another.

    An empty segment has no rows; queries of a segment without keys yield zeros, and rows behind the last segment mean
    nothing. Scores, softmax and sums are float32 (float64 for float64); the reference adds the bias in query's dtype.
    Which implementation runs is told in :mod:`ops.attention_backends`.

    Args:
        query: floating ``(total_q, heads, head_dim)``, any strides: a view of timm's ``(total, 3, heads, head_dim)``
            projection is read where it lies.
        key, value: the same dtype, ``(total_k, heads, head_dim)``, any strides.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``, FlashAttention's convention.
        max_seqlen_q, max_seqlen_k: at least the longest segment. Not checked on a GPU: looking would synchronise.
        scale: factor on the scores, ``head_dim ** -0.5`` by default.
        bias: relative position bias; queries and keys are the same tokens then.

    Returns:
        ``(total_q, heads, head_dim)``, contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not belong together, by name.
    """
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k, bias)
    table = None if bias is None else bias.table
    attend = reference.varlen_attention if wants_gradient(query, key, value, table) else _op
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend(query, key, value, *lengths, scale, *(bias or ()))


def varlen_attention_qkvpacked(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None, bias: RelativeBias | None = None
) -> Tensor:
    """:func:`varlen_attention` of tokens with themselves, from and to the shapes of the projections around it.

    Args:
        qkv: floating ``(total, 3, heads, head_dim)``, any strides: timm's ``qkv(x)``, viewed.
        cu_seqlens: int32 ``(batch + 1,)``.
        max_seqlen: at least the longest segment.
        scale, bias: see :func:`varlen_attention`.

    Returns:
        ``(total, heads * head_dim)``, contiguous.

    Raises:
        ValueError: ``qkv`` of another shape.
    """
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: got {tuple(qkv.shape)}, accepted is (total, 3, heads, head_dim)")
    query, key, value = qkv.unbind(1)
    return varlen_attention(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, bias).flatten(1)


def _check(query, key, value, cu_seqlens_q, cu_seqlens_k, bias) -> None:
    """Refuse what a kernel would read wrongly; touches no values."""
    if query.ndim != 3 or query.shape[2] == 0:
        raise ValueError(f"query: got {tuple(query.shape)}, accepted is (total, heads, head_dim)")
    if not query.is_floating_point():
        raise TypeError(f"query: got {query.dtype}, accepted is floating point")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != key.shape or tensor.shape[1:] != query.shape[1:]:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}, accepted is (total_k, *{tuple(query.shape[1:])})")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, accepted is query's {query.dtype}")
        _check_device(name, tensor, query)
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor.dtype != torch.int32 or tensor.shape != cu_seqlens_q.shape or tensor.ndim != 1 or not len(tensor):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: got {got}, accepted is int32 (batch + 1,), the same for queries and keys")
        _check_device(name, tensor, query)
    if bias is not None:
        rows, columns = bias.grid_size
        distances, heads = (2 * rows - 1) * (2 * columns - 1), query.shape[1]
        if tuple(bias.table.shape) not in ((distances, heads), (distances + 3, heads)):
            accepted = f"({distances}, {heads}) or ({distances + 3}, {heads})"
            raise ValueError(f"bias.table: got {tuple(bias.table.shape)}, accepted is {accepted}")
        if bias.positions.dtype != torch.int32 or bias.positions.shape != query.shape[:1]:
            got = f"{bias.positions.dtype} {tuple(bias.positions.shape)}"
            raise ValueError(f"bias.positions: got {got}, accepted is int32 ({query.shape[0]},)")
        if key.shape != query.shape:
            raise ValueError(f"key: got {key.shape[0]} rows, accepted with a bias are query's {query.shape[0]}")
        if not bias.table.is_floating_point():
            raise TypeError(f"bias.table: got {bias.table.dtype}, accepted is floating point")
        _check_device("bias.table", bias.table, query)
        _check_device("bias.positions", bias.positions, query)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got it on {tensor.device}, accepted is query's {query.device}")


@register_flop_formula(torch.ops.tinydrop.varlen_attention, get_raw=True)
def _flops(query, key, value, cu_seqlens_q, cu_seqlens_k, *args, out_val=None, **kwargs) -> int:
    """Two products of 2 * head_dim FLOPs for each pair of query and key of a segment."""
    pairs = (cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum().item()
    return 4 * pairs * query.shape[1] * query.shape[2]
