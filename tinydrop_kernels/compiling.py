"""``torch.compile`` on request, kept by function and not by model: so models still copy and pickle.

The models a function works on are its arguments; torch compiles it anew for another model, dtype or device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor


@functools.cache
def for_any_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for any shapes and numbers, but that torch takes 1 for another than all larger ones."""
    return torch.compile(function, dynamic=True)


@functools.cache
def for_any_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model and images, compiled for any number of images of one size."""
    run = torch.compile(function)

    def marked(model: Any, images: Tensor) -> Any:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return run(model, images)

    return marked
