"""Linear layers on CPU by the faster of two libraries, oneDNN or MKL; torch takes MKL for float32 (docs/decisions.md).

Weights can be prepacked: converted once to oneDNN's own layout instead of at every call. A layer with prepacked weights
can be a 1 x 1 convolution too, and can apply GELU before it writes its output.
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
# Below this many rows a product mostly waits for its weights, and oneDNN was faster on every CPU that was tried.
MANY_ROWS = 512


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``F.linear``, with oneDNN where it supports the arguments and is faster."""
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.tinydrop.cpu_linear(x, weight, bias, "none", False)
    return out


def run_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Run a linear layer: packed tokens ``(total, in_features)`` by :func:`linear`, dense tokens by torch."""
    return linear(x, layer.weight, layer.bias) if x.ndim == 2 else nn.Linear.forward(layer, x)


def run_prepacked(layer: nn.Linear | nn.Conv2d, x: Tensor, activation: str = "none") -> Tensor:
    """Run a layer with prepacked weights where oneDNN supports the arguments, otherwise as torch does.

    The weights are packed at the first call, and again after they have changed (:mod:`ops.derived`). Several threads
    may call this function at once.

    Args:
        layer: a linear layer, or a convolution for which :func:`is_pointwise` is true.
        x: ``(..., in_features)``, or ``(batch, in_channels, height, width)`` for a convolution, which runs in torch
            unless ``x`` is channels-last.
        activation: ``"gelu"`` applies the exact (not the tanh) GELU to the output, ``"none"`` nothing.
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
    """Return whether the layer is a convolution that applies one linear layer to each pixel."""
    if type(layer) is not nn.Conv2d:
        return False
    size, stride = layer.kernel_size, layer.stride
    return size == stride == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid", "same")


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype in (torch.float32, torch.bfloat16)
        and type(weight) in (Tensor, nn.Parameter)  # no subclass, which may redefine products
        and weight.layout == torch.strided
        and x.numel() > 0
        and HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(x, weight, bias)
    )


def _by_faster_library(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, packs: bool) -> Tensor:
    """Run the operator ``cpu_linear`` with the faster library.

    It is an operator, opaque to Inductor, because Inductor takes MKL unless the weights are frozen.
    """
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
    """Return whether torch (MKL) is faster than oneDNN at float32 products of many rows. Measured once per process.

    The measurement takes 50 ms on a core with AVX512. The choice changes an answer only by rounding.
    """
    x = weight = torch.ones(768, 768)  # fits the caches; smaller ones mislead, because packing dominates
    seconds: dict[Any, list[float]] = {F.linear: [], onednn_linear: []}
    for _ in range(3):
        for product, taken in seconds.items():
            start = time.process_time()  # not wall time, which other processes on a busy machine distort
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
    """Count FLOPs as torch does for its own linear layers."""
    return 2 * x.numel() * out_val.shape[-1]
