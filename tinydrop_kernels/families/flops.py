"""FLOP counts of single modules.

The rules are those of ``torch.utils.flop_counter``. A multiply-add in a matrix product, a convolution or attention
counts as two FLOPs, and everything else as none. The FLOPs of a packed call depend on the batch, so each family has a
formula for them (:mod:`families`). ``tests/families/test_flops.py`` compares the formulas with the counter.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_counted: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]]" = WeakKeyDictionary()


def count_flops(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return the FLOPs of a module on one image.

    They are counted on meta tensors, so nothing is computed, and kept for the next call with the same shape.

    Args:
        module: a module that takes a tensor ``(1, *image_shape)``.
        image_shape: channels, height and width.
    """
    known = _counted.setdefault(module, {})
    if image_shape not in known:
        # Cast to one dtype, because a half-precision guidance model keeps its head in float32.
        copied = copy.deepcopy(module).to("meta", torch.float32)
        image = torch.empty(1, *image_shape, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(image)
        known[image_shape] = counter.get_total_flops()
    return known[image_shape]


def linear_flops(module: nn.Module | None) -> int:
    """Return the FLOPs of a linear layer on one row, quantised or not. Return 0 for any other module or None."""
    size = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
    return 2 * size[0] * size[1]
