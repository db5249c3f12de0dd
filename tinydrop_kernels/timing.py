"""Does it pay? A patched model and the same model dense, timed in turn on the same images."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.report import Report

T = TypeVar("T")


def warm_up_calls(model: TimmModule) -> int:
    """After how many calls with a batch a patched model has done what it does once: of two graphs are recorded."""
    return 1 if model.tinydrop.graphs is None else 2


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


@torch.inference_mode()
def compare_with_dense(model: TimmModule, images: Tensor, rounds: int = 5) -> Report:
    """Measure what patching earns on a batch: ``str`` of the report says in words where it does not pay.

    After one round of each that is not counted, or two with CUDA graphs, the patched and the dense model take turns;
    medians count. A last round of the patched model, timed stage by stage, tells where its time goes.

    Args:
        model: patched, in eval mode. Its policy is the one that is judged.
        images: as the model takes them, on its device. Exits, grids and the batch size bear on the result, so take
            images of the kind and number that will come.
        rounds: how many are counted.

    Returns:
        The report of the batch with ``wall_seconds``, ``dense_seconds`` and ``seconds`` by stage.

    Raises:
        ValueError: the model is not patched, there are no images, or ``rounds`` is below 1.
        RuntimeError: the model is in training mode.
    """
    check_patched(model)
    check_eval(model)
    if len(images) == 0:
        raise ValueError("images: got none, expected a batch to be timed")
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected a number >= 1")
    tinydrop, spent = model.tinydrop, []
    for _ in range(warm_up_calls(model) + rounds):
        spent.append([timed(call, images)[1] for call in (model, tinydrop.dense)])
    wall, dense = (statistics.median(times) for times in zip(*spent[-rounds:], strict=True))
    was_timed, tinydrop.timed = tinydrop.timed, True
    try:
        model(images)
    finally:
        tinydrop.timed = was_timed
    report: Report = tinydrop.report()
    return replace(report, wall_seconds=wall, dense_seconds=dense)


def check_patched(model: TimmModule) -> None:
    """Raise ValueError if a model is not patched."""
    if not hasattr(model, "tinydrop"):
        raise ValueError(f"model: this {type(model).__name__} is not patched; call tinydrop_kernels.patch on it first")


def check_eval(model: TimmModule) -> None:
    """Raise RuntimeError if a model is in training mode."""
    if model.training:
        raise RuntimeError("model: it is in training mode, in which it drops nothing; call model.eval() first")


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize(images.device)
