"""Softmax attention within each segment of a packed batch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops import cuda_extension
from tinydrop_kernels.ops.attention_reference import attend_padded, attend_segments
from tinydrop_kernels.ops.registry import (
    HALF,
    OPERATORS,
    Implementation,
    define,
    kernels,
    reference,
    triton,
    wants_gradient,
)
from tinydrop_kernels.ops.types import RelativeBias

TRITON_DTYPES = (*HALF, torch.float32)


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
    skip_keys: int = 0,
) -> Tensor:
    """Compute ``softmax(scale * query @ key.T + bias) @ value`` within each segment of a packed batch.

    A query attends only to keys of its own segment. A query of a segment without keys yields zeros. Output rows behind
    the last segment are undefined. Scores, softmax and sums are float32 (float64 for float64); the reference adds the
    bias in query's dtype. ``ops.OPERATORS["varlen_attention"].choose`` returns the implementation that would run.

    Args:
        query: floating ``(total_q, heads, head_dim)``, any strides. A view of timm's ``(total, 3, heads, head_dim)``
            projection is read without a copy.
        key, value: the same dtype, ``(total_k, heads, head_dim)``, any strides.
        cu_seqlens_q, cu_seqlens_k: int32 ``(segments + 1,)``, FlashAttention's convention.
        max_seqlen_q, max_seqlen_k: upper bounds on the longest segment. The kernels do not check them, because the
            check would synchronise.
        scale: factor on the scores, ``head_dim ** -0.5`` by default.
        bias: relative position bias. Requires that queries and keys are the same tokens.
        skip_keys: number of keys at the start of each segment to leave out, such as prefix tokens in some pools.

    Returns:
        ``(total_q, heads, head_dim)``, contiguous.

    Raises:
        ValueError: a shape, a device, a bound or the dtype of an integer tensor does not match; named in the message.
        TypeError: the dtype of a floating tensor does not match; named in the message.

    Example:
        >>> query, key, value = torch.randn(5, 3, 2, 8).unbind(1)  # two images of 2 and 3 tokens
        >>> cu_seqlens = torch.tensor([0, 2, 5]).int()
        >>> ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, 3, 3).shape
        torch.Size([5, 2, 8])
    """
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k, bias, skip_keys)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    table, positions, grid_size = (None, None, (1, 1)) if bias is None else bias
    if wants_gradient(query, key, value, table):
        return _reference(query, key, value, *lengths, scale, table, positions, grid_size, skip_keys)
    if bias is None and not skip_keys:  # leave defaults out, because each argument costs the dispatcher time
        return _op(query, key, value, *lengths, scale)  # type: ignore[no-any-return]
    return _op(query, key, value, *lengths, scale, table, positions, grid_size, skip_keys)  # type: ignore[no-any-return]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: RelativeBias | None,
    skip_keys: int,
) -> None:
    """Raise if a kernel would misread the arguments. Reads only shapes, dtypes and devices, never values."""
    if _is_usual(query, key, value, cu_seqlens_q, cu_seqlens_k) and bias is None and not skip_keys:
        return
    if query.ndim != 3 or query.shape[2] == 0:
        raise ValueError(f"query: got {tuple(query.shape)}, expected (total, heads, head_dim)")
    if not query.is_floating_point():
        raise TypeError(f"query: got {query.dtype}, expected floating point")
    for name, tensor in (("key", key), ("value", value)):
        expected = key.shape if key.ndim == 3 and key.shape[1:] == query.shape[1:] else ("total_k", *query.shape[1:])
        if tensor.shape != expected:
            raise ValueError(f"{name}: got {tuple(tensor.shape)}, expected ({', '.join(map(str, expected))})")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected query's {query.dtype}")
        _check_device(name, tensor, query)
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor.dtype != torch.int32 or tensor.shape != cu_seqlens_q.shape or tensor.ndim != 1 or not len(tensor):
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{name}: got {got}, expected int32 (segments + 1,), the same for queries and keys")
        _check_device(name, tensor, query)
    if skip_keys < 0 or (skip_keys and bias is not None):
        raise ValueError(f"skip_keys: got {skip_keys}, expected a number >= 0, and 0 with a bias")
    if bias is not None:
        _check_bias(query, key, bias)


def _is_usual(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> bool:
    """Return whether the arguments are plain self-attention without faults, in a dtype that Triton takes.

    This test takes a third of the time of the full checks.
    """
    shape, dtype, device = query.shape, query.dtype, query.device
    return (
        cu_seqlens_q is cu_seqlens_k
        and shape == key.shape == value.shape
        and dtype == key.dtype == value.dtype
        and device == key.device == value.device == cu_seqlens_q.device
        and len(shape) == 3
        and shape[2] > 0
        and dtype in TRITON_DTYPES
        and cu_seqlens_q.dtype == torch.int32
        and cu_seqlens_q.ndim == 1
        and cu_seqlens_q.shape[0] > 0
    )


def _check_bias(query: Tensor, key: Tensor, bias: RelativeBias) -> None:
    rows, columns = bias.grid_size
    distances, heads = (2 * rows - 1) * (2 * columns - 1), query.shape[1]
    if tuple(bias.table.shape) not in ((distances, heads), (distances + 3, heads)):
        expected = f"({distances}, {heads}) or ({distances + 3}, {heads})"
        raise ValueError(f"bias.table: got {tuple(bias.table.shape)}, expected {expected}")
    if bias.positions.dtype != torch.int32 or bias.positions.shape != query.shape[:1]:
        got = f"{bias.positions.dtype} {tuple(bias.positions.shape)}"
        raise ValueError(f"bias.positions: got {got}, expected int32 ({query.shape[0]},)")
    if key.shape != query.shape:
        raise ValueError(f"key: got {key.shape[0]} rows, expected query's {query.shape[0]} because of bias")
    if not bias.table.is_floating_point():
        raise TypeError(f"bias.table: got {bias.table.dtype}, expected floating point")
    _check_device("bias.table", bias.table, query)
    _check_device("bias.positions", bias.positions, query)


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name}: got it on {tensor.device}, expected query's {query.device}")


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    bias_table: Tensor | None,
    positions: Tensor | None,
    grid_size: tuple[int, int],
    skip_keys: int,
) -> Tensor:
    """Attend in plain PyTorch, on any device.

    On CPU, segments of equal length share a call, which was the fastest variant measured (docs/decisions.md). On other
    devices this would read the lengths back in every layer, so the segments are padded instead.
    """
    bias = None if bias_table is None or positions is None else RelativeBias(bias_table, positions, grid_size)
    starts_k = cu_seqlens_k[:-1] + skip_keys if skip_keys else cu_seqlens_k[:-1]
    attend = attend_segments if query.device.type == "cpu" else attend_padded
    return attend(query, key, value, cu_seqlens_q, starts_k, cu_seqlens_k[1:], max_seqlen_q, max_seqlen_k, scale, bias)


def _triton(*arguments: Any) -> Tensor:
    return kernels("attention").launch(*arguments)  # type: ignore[no-any-return]


def _triton_takes(call: Any) -> bool:
    query, scale = call.query, call.scale
    is_usual = scale is None or cuda_extension.SCALES[0] <= scale <= cuda_extension.SCALES[1]
    return bool(is_usual and query.shape[2] <= 128 and query.dtype in TRITON_DTYPES)


def _torch_takes(call: Any) -> bool:
    head_dim = call.query.shape[2]
    plain = call.bias_table is None and not call.skip_keys and (call.scale is None or call.scale > 0)
    fits = call.query.dtype in HALF and head_dim % 8 == 0 and head_dim <= 256 and len(call.query) and len(call.key)
    return bool(plain and fits) and all(cuda_extension.is_aligned(t) for t in (call.query, call.key, call.value))


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    *others: Any,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    # Pass scale by name, because the parameters after the first seven differ between releases of torch.
    out = varlen_attn(query, key, value, *starts, max_seqlen_q, max_seqlen_k, scale=scale)
    assert isinstance(out, Tensor)
    return out.contiguous()


def _not_on_cuda(device_type: str) -> str | None:
    return None if device_type == "cuda" else f"torch's varlen_attn does not run on {device_type}"


# The order has not been measured on a GPU yet. Triton comes first, because it takes every dtype except float64, every
# layout and a bias, and is tested most. The experimental CUDA extension comes second, where it is built, then torch's
# varlen_attn. The reference is last, because padding computes values that are not needed. Once the implementations have
# been timed on a GPU, put the fastest first.
_op = define(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale=None, Tensor? bias_table=None, Tensor? positions=None, "
    "SymInt[2] grid_size=[1, 1], SymInt skip_keys=0) -> Tensor",
    lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format),
    [
        triton(_triton, _triton_takes),
        Implementation(
            "cuda", "CUDA C++ extension", cuda_extension.launch, cuda_extension.missing_on, cuda_extension.takes
        ),
        Implementation("torch", "torch's varlen_attn", _torch, _not_on_cuda, _torch_takes),
        reference(_reference, "scaled_dot_product_attention"),
    ],
)


@register_flop_formula(torch.ops.tinydrop.varlen_attention, get_raw=True)
def _flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *others: Any,
    out_val: Any = None,
) -> int:
    """Count two products of 2 * head_dim FLOPs for each pair of a query and a key of the same segment."""
    skip_keys = OPERATORS["varlen_attention"].call(query, key, value, cu_seqlens_q, cu_seqlens_k, *others).skip_keys
    keys = (cu_seqlens_k.diff().long() - skip_keys).clamp(min=0)
    pairs = int((cu_seqlens_q.diff().long() * keys).sum())
    return 4 * pairs * query.shape[1] * query.shape[2]
