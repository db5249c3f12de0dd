"""Wall time of a call and of its stages, including the work of the device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import TimmModule

T = TypeVar("T")


def wait_for(tensor: Tensor) -> None:
    """Wait until the current stream of a tensor's device has finished its work."""
    if tensor.device.type != "cpu":
        torch.accelerator.current_stream(tensor.device).synchronize()


def timed(call: Callable[[Tensor], T], images: Tensor) -> tuple[T, float]:
    """Return the result of ``call(images)`` and the seconds that it took, including the work of the images' device."""
    _synchronize(images)
    start = time.perf_counter()
    answer = call(images)
    _synchronize(images)
    return answer, time.perf_counter() - start


@contextmanager
def timed_stage(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the seconds spent within the context to ``seconds[name]``. On a GPU this waits until the work is done."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)


def warm_up_calls(model: TimmModule) -> int:
    """Return how many calls with a batch warm a patched model up: 2 if it records CUDA graphs, otherwise 1."""
    return 1 if model.tinydrop.graphs is None else 2
