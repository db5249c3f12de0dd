"""Linear layers on CPU with weights laid out as oneDNN reads them, once and not at every call.

Of 50 rows a ViT-B/16's layers then take two thirds of the time (docs/decisions.md).
"""

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinydrop_kernels.ops.registry import wants_gradient
from tinydrop_kernels.ops.types import TimmModule


class _Packed(NamedTuple):
    weight: "weakref.ref[Tensor]"
    address: int
    version: int
    packed: Any  # opaque: it neither copies nor pickles, so it is kept apart from the module


_packed: "weakref.WeakKeyDictionary[nn.Linear, _Packed]" = weakref.WeakKeyDictionary()


def packed_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear.forward`` with packed weights where it can be, anywhere else as torch has it.

    The weights are packed at the first call, and again after they were changed or moved; a change through ``.data``
    is not seen. Many threads may call it.
    """
    if not _takes(linear, x):
        return F.linear(x, linear.weight, linear.bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, _weight_of(linear), linear.bias, "none", [], "")
    return out


def _takes(linear: nn.Linear, x: Tensor) -> bool:
    weight = linear.weight
    return (
        x.device.type == "cpu" == weight.device.type
        and x.dtype == weight.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not weight.is_inference()  # whose changes are not counted
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(x, weight, linear.bias)
    )


def _weight_of(linear: nn.Linear) -> Any:
    weight, known = linear.weight, _packed.get(linear)
    if (
        known is None
        or known.weight() is not weight
        or (known.address, known.version) != (weight.data_ptr(), weight._version)
    ):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        known = _Packed(weakref.ref(weight), weight.data_ptr(), weight._version, packed)
        _packed[linear] = known
    return known.packed


def packable(model: TimmModule) -> list[nn.Linear]:
    """The linear layers of the blocks that are torch's own, but the last block's, which is run in pieces.

    Raises:
        ValueError: the model has stages of blocks, each of which is run in pieces.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"prepack: got True for a {type(model).__name__}, expected a model with one stack of blocks")
    *blocks, _ = model.blocks
    modules = (module for block in blocks for module in block.modules())
    return [module for module in modules if type(module) is nn.Linear and "forward" not in vars(module)]
