"""Wall time of a call and of its stages, with the work of the device included."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import TimmModule

T = TypeVar("T")


def wait_for(tensor: Tensor) -> None:
    """Wait until the current stream of a tensor's device has done all that it was told to."""
    if tensor.device.type != "cpu":
        torch.accelerator.current_stream(tensor.device).synchronize()


def timed(call: Callable[[Tensor], T], images: Tensor) -> tuple[T, float]:
    """What a call with the images returns, and the seconds it took, their device's work included."""
    _synchronize(images)
    start = time.perf_counter()
    answer = call(images)
    _synchronize(images)
    return answer, time.perf_counter() - start


@contextmanager
def timed_stage(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Add the seconds of what is done within to those of its name; on a GPU until it has done it."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)


def warm_up_calls(model: TimmModule) -> int:
    """Return after how many calls with a batch a patched model has done what it does once, such as recording graphs."""
    return 1 if model.tinydrop.graphs is None else 2
