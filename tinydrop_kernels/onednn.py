"""Linear layers on CPU by oneDNN: its float32 is faster than MKL's, which torch takes (docs/decisions.md).

Weights can be packed: laid out as oneDNN reads them, once and not at every call. Then 1 x 1 convolutions are linear
layers too, and GELU is applied to what a layer gives before it is written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from tinydrop_kernels.derived import derived, keeps
from tinydrop_kernels.ops.registry import LIBRARY, wants_gradient
from tinydrop_kernels.ops.types import TimmModule


def _multiplies(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies in this dtype on this CPU, found out by a tiny product.

    It has bfloat16 where the processor does. No list of processors tells that, and torch's own question is wrong where
    an environment variable forbids instructions. A torch that has renamed these private operators has none for us.
    """
    try:
        x = torch.ones(2, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(x, None)
        products = [torch.ops.mkldnn._linear_pointwise(x, w, None, "gelu", [], "none") for w in (x, packed)]
    except (AttributeError, RuntimeError, TypeError):
        return False
    return all(product.shape == (2, 2) for product in products)


DTYPES = frozenset(filter(_multiplies, (torch.float32, torch.bfloat16)))  # that oneDNN has here


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by oneDNN where it can be."""
    return _product(x, weight, bias, "none", False) if _takes(x, weight, bias) else F.linear(x, weight, bias)


def run_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear.forward``; packed tokens ``(total, in_features)`` by :func:`linear`, timm's dense ones by torch."""
    return linear(x, layer.weight, layer.bias) if x.ndim == 2 else nn.Linear.forward(layer, x)


def run_packed(layer: nn.Linear | nn.Conv2d, x: Tensor, activation: str = "none") -> Tensor:
    """The layer's forward with packed weights where it can be, anywhere else as torch has it.

    The weights are packed at the first call and again after they changed (:mod:`tinydrop_kernels.derived` tells which
    changes are noticed). Many threads may call it.

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
    out = _product(rows, layer.weight, layer.bias, activation, True)
    return out.permute(0, 3, 1, 2) if convolves else out


def is_pointwise(layer: nn.Module) -> bool:
    """Whether the layer is a convolution that is a linear layer of each pixel."""
    if type(layer) is not nn.Conv2d:
        return False
    size, stride = layer.kernel_size, layer.stride
    return size == stride == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid", "same")


def linears(model: TimmModule) -> list[nn.Linear]:
    """The linear layers of the blocks that are torch's own."""
    blocks = model.blocks if hasattr(model, "blocks") else model.layers
    return [module for module in blocks.modules() if type(module) is nn.Linear and "forward" not in vars(module)]


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype
        and x.dtype in DTYPES
        and type(weight) in (Tensor, nn.Parameter)  # no subclass, which may mean anything by a product
        and weight.layout == torch.strided
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(x, weight, bias)
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, packs: bool) -> Tensor:
    # compiled, by an operator of our own: inductor takes oneDNN's for weights that never change alone
    run = torch.ops.tinydrop.onednn_linear if torch.compiler.is_compiling() else _by_onednn
    out: Tensor = run(x, weight, bias, activation, packs)
    return out


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, packs: bool) -> Tensor:
    laid_out = _packed_weight(weight) if packs and keeps(weight) else weight.flatten(1)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, activation, [], "none")
    return out


def _packed_weight(weight: Tensor) -> Any:
    pack = torch.ops.mkldnn._reorder_linear_weight
    return derived(weight, "packed by oneDNN", lambda: pack(weight.detach().flatten(1), None))


LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, str activation, bool packs) -> Tensor")
LIBRARY.impl("onednn_linear", _by_onednn, "CPU")
torch.library.register_fake(
    "tinydrop::onednn_linear",
    lambda x, weight, bias, activation, packs: x.new_empty(*x.shape[:-1], weight.shape[0]),
    lib=LIBRARY,
)


def _flops(x: Tensor, *others: Any, out_val: Tensor) -> int:
    return 2 * x.numel() * out_val.shape[-1]


if DTYPES and torch.ops.mkldnn._linear_pointwise not in flop_registry:  # torch's counter does not know it, yet
    register_flop_formula(torch.ops.mkldnn._linear_pointwise, get_raw=True)(_flops)
