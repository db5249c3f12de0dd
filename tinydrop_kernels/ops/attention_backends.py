"""Which implementation of varlen_attention runs, and why: one table, read from the top."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinydrop_kernels.ops import backend, cuda, reference
from tinydrop_kernels.ops.attention_arguments import AttentionArguments
from tinydrop_kernels.ops.library import kernel_of

HALF = (torch.float16, torch.bfloat16)


class Implementation(NamedTuple):
    name: str
    runs_on: Callable[[str], bool]  # whether this machine has it, for tensors on a type of device
    takes: Callable[[AttentionArguments], bool]
    launch: Callable[..., Tensor]  # takes the operator's arguments
    what: str


def _triton_takes(call: AttentionArguments) -> bool:
    return call.query.shape[2] <= 128 and call.query.dtype in (*HALF, torch.float32)


def _varlen_attn_takes(call: AttentionArguments) -> bool:
    head_dim, plain = call.query.shape[2], call.bias_table is None and (call.scale is None or call.scale > 0)
    fits = call.query.dtype in HALF and head_dim % 8 == 0 and head_dim <= 256 and len(call.query) and len(call.key)
    return bool(plain and fits) and all(cuda.is_aligned(tensor) for tensor in call[:3])


def _varlen_attn(*arguments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    call = AttentionArguments(*arguments)
    # What follows the first seven arguments has moved between torch's releases.
    starts = call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous()
    out = varlen_attn(*call[:3], *starts, call.max_seqlen_q, call.max_seqlen_k, scale=call.scale)
    assert isinstance(out, Tensor)
    return out.contiguous()


# The first that takes the arguments runs. No order among them has been measured on a GPU yet. Until it is, Triton comes
# first because it takes every dtype, layout and bias; then the extension, which has tiles for short segments too; then
# torch's, which has them for long ones; padding, which computes what nobody needs, comes last.
IMPLEMENTATIONS = (
    Implementation(
        "triton",
        lambda device: backend.HAS_TRITON,
        _triton_takes,
        lambda *arguments: kernel_of("varlen_attention")(*arguments),  # imports Triton
        "Triton kernel",
    ),
    Implementation(
        "cuda", lambda device: device == "cuda" and cuda.available(), cuda.fits, cuda.launch, "CUDA C++ extension"
    ),
    Implementation("torch", lambda device: device == "cuda", _varlen_attn_takes, _varlen_attn, "torch's varlen_attn"),
    Implementation(
        "reference", lambda device: True, lambda call: True, reference.varlen_attention, "scaled_dot_product_attention"
    ),
)


def preference(device_type: str) -> Sequence[Implementation]:
    """What to try for tensors on such a device, in this order: what is forced before the others.

    Raises:
        ValueError: the environment variable holds no backend.
        RuntimeError: the forced backend cannot run there.
    """
    forced = backend.forced_backend()
    if forced == "reference" or (forced == "auto" and device_type != "cuda"):
        return IMPLEMENTATIONS[-1:]
    if forced == "cuda" and device_type != "cuda":
        raise RuntimeError(f"backend: cuda is forced, but the CUDA extension has nothing for {device_type}")
    if forced == "cuda" and not cuda.available():
        raise RuntimeError(f"backend: cuda is forced, but the CUDA extension is not there: {cuda.WHY_NOT}")
    if forced == "triton":
        backend.choose_backend(device_type)  # raises where Triton cannot run
    return sorted(IMPLEMENTATIONS, key=lambda implementation: implementation.name != forced)


def first_on(device_type: str) -> Implementation:
    """What runs on such a device if it takes the arguments."""
    return next(implementation for implementation in preference(device_type) if implementation.runs_on(device_type))


def choose(call: AttentionArguments) -> Implementation:
    """The first implementation that this machine has and that takes these arguments; the reference takes all."""
    device_type = call.query.device.type
    return next(i for i in preference(device_type) if i.runs_on(device_type) and i.takes(call))


def dispatch(*arguments) -> Tensor:
    """Run the chosen implementation on the operator's arguments."""
    return choose(AttentionArguments(*arguments)).launch(*arguments)
