"""Linear layers on CPU by the library that is faster there, oneDNN or MKL, where torch takes MKL (docs/decisions.md).

Weights can be packed: laid out as oneDNN reads them, once and not at every call. Then 1 x 1 convolutions are linear
layers too, and GELU is applied to what a layer gives before it is written.
"""

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from tinydrop_kernels.ops.derived import derived, keeps
from tinydrop_kernels.ops.registry import LIBRARY, wants_gradient
from tinydrop_kernels.torch_internals import has_onednn_linear, onednn_linear, onednn_prepacked

HAS_ONEDNN = torch.backends.mkldnn.is_available()
# Of a product of fewer rows, reading the weights takes the time, which oneDNN does faster on every CPU that was tried.
MANY_ROWS = 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by oneDNN where it can be."""
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.tinydrop.cpu_linear(x, weight, bias, "none", False)
    return out


def run_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear.forward``; packed tokens ``(total, in_features)`` by :func:`linear`, timm's dense ones by torch."""
    return linear(x, layer.weight, layer.bias) if x.ndim == 2 else nn.Linear.forward(layer, x)


def run_prepacked(layer: nn.Linear | nn.Conv2d, x: Tensor, activation: str = "none") -> Tensor:
    """The layer's forward with packed weights where it can be, anywhere else as torch has it.

    The weights are packed at the first call, and again after they have changed (:mod:`ops.derived`). Many threads may
    call it.

    Args:
        layer: linear, or a convolution for which :func:`is_pointwise`.
        x: ``(..., in_features)``, or ``(batch, in_channels, height, width)``; not channels-last it is left to torch.
        activation: ``"gelu"`` applies the exact one.
    """
    convolves = isinstance(layer, nn.Conv2d)
    if not _takes(x, layer.weight, layer.bias) or (
        convolves and not x.is_contiguous(memory_format=torch.channels_last)
    ):
        forward: Any = type(layer).forward
        out: Tensor = forward(layer, x)
        return F.gelu(out) if activation == "gelu" else out
    rows = x.permute(0, 2, 3, 1) if convolves else x
    out = torch.ops.tinydrop.cpu_linear(rows, layer.weight, layer.bias, activation, True)
    return out.permute(0, 3, 1, 2) if convolves else out


def is_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is a convolution that is a linear layer of each pixel."""
    if type(layer) is not nn.Conv2d:
        return False
    size, stride = layer.kernel_size, layer.stride
    return size == stride == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid", "same")


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype in (torch.float32, torch.bfloat16)
        and type(weight) in (Tensor, nn.Parameter)  # no subclass, which may mean anything by a product
        and weight.layout == torch.strided
        and x.numel() > 0
        and HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(x, weight, bias)
    )


def _by_faster_library(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, packs: bool) -> Tensor:
    """The operator, opaque to Inductor, which would take oneDNN for weights that never change alone, and else MKL."""
    matrix, packs = weight.flatten(1), packs and keeps(weight)
    if not has_onednn_linear(x.dtype):
        out = F.linear(x, matrix, bias)
    elif packs:
        return onednn_linear(x, _prepacked_weight(weight), bias, activation)
    elif x.dtype == torch.float32 and x.numel() >= MANY_ROWS * x.shape[-1] and is_torch_faster():
        out = F.linear(x, matrix, bias)
    else:
        return onednn_linear(x, matrix, bias, activation)
    return F.gelu(out) if activation == "gelu" else out


@functools.cache
def is_torch_faster() -> bool:
    """Return whether float32 products of many rows are faster by torch, that is MKL, than by oneDNN; measured once.

    It takes 50 ms of a core with AVX512. The choice changes no more than an answer's rounding.
    """
    x = weight = torch.ones(768, 768)  # in caches; smaller ones mislead, as either library packs them at each call
    seconds: dict[Any, list[float]] = {F.linear: [], onednn_linear: []}
    for _ in range(3):
        for product, taken in seconds.items():
            start = time.process_time()  # not the clock's, since a busy machine interrupts one more than the other
            product(x, weight, None)
            taken.append(time.process_time() - start)
    return min(seconds[F.linear]) < min(seconds[onednn_linear])


def _prepacked_weight(weight: Tensor) -> Any:
    return derived(weight, "prepacked", lambda: onednn_prepacked(weight.detach().flatten(1)))


LIBRARY.define("cpu_linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool packs) -> Tensor")
LIBRARY.impl("cpu_linear", _by_faster_library, "CPU")
torch.library.register_fake(
    "tinydrop::cpu_linear",
    lambda x, weight, bias, activation, packs: x.new_empty(*x.shape[:-1], weight.shape[0]),
    lib=LIBRARY,
)


@register_flop_formula(torch.ops.tinydrop.cpu_linear, get_raw=True)
def _flops(x: Tensor, *others: Any, out_val: Tensor) -> int:
    """Count as torch counts its own linear layers."""
    return 2 * x.numel() * out_val.shape[-1]
