"""Counting the FLOPs of a module.

As ``torch.utils.flop_counter`` does: two per multiply-add of matrix products, convolutions and attention; everything
else is free. What a packed call costs is a formula of its family (:mod:`families`), since every batch costs otherwise;
``tests/families/test_flops.py`` holds the formulas against the counter.
"""

import copy
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_counted: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]]" = WeakKeyDictionary()


def count_flops(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """FLOPs of a module on one image, counted on meta tensors: nothing is computed. Counted once a shape.

    Args:
        module: takes ``(1, *image_shape)``.
        image_shape: channels, height and width.
    """
    known = _counted.setdefault(module, {})
    if image_shape not in known:
        copied = copy.deepcopy(module).to("meta", torch.float32)  # a guidance model's head is wider than its trunk
        image = torch.empty(1, *image_shape, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            copied(image)
        known[image_shape] = counter.get_total_flops()
    return known[image_shape]


def linear_flops(module: nn.Module | None) -> int:
    """FLOPs of a linear layer on one row, quantised or not; 0 for anything else."""
    size = (getattr(module, "in_features", 0), getattr(module, "out_features", 0))
    return 2 * size[0] * size[1]
