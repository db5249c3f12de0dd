"""The speed of a patched model, compared with the same model run dense on the same images."""

import statistics
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from tinydrop_kernels.engine.checks import check_eval, check_patched
from tinydrop_kernels.engine.stopwatch import timed, warm_up_calls
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.report import Report


@torch.inference_mode()
def benchmark(model: TimmModule, images: Tensor, rounds: int = 5) -> Report:
    """Measure how much time and how many FLOPs patching saves on a batch.

    The patched and the dense model run in turn, and the report has the median of each. The first round warms up and is
    not counted; with CUDA graphs, neither is the second. One more call of the patched model is timed stage by stage.

    Args:
        model: a patched model in eval mode. Its own policy is measured.
        images: a batch as the model takes it, on the model's device. The result depends on the images and on the batch
            size, so pass images of the kind and number that you will classify.
        rounds: number of counted rounds.

    Returns:
        The report of the batch with ``wall_seconds``, ``dense_seconds`` and ``seconds`` by stage. Printed, the report
        also says in words where patching does not pay.

    Raises:
        ValueError: the model is not patched, there are no images, or ``rounds`` is below 1.
        RuntimeError: the model is in training mode.

    Example:
        >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))
        >>> report = tdk.benchmark(model, images, rounds=1)
        >>> report.images, report.wall_seconds > 0, report.dense_seconds > 0
        (2, True, True)
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


def compare_with_dense(model: TimmModule, images: Tensor, rounds: int = 5) -> Report:
    """Return ``benchmark(model, images, rounds)``. Deprecated: the next release drops this name."""
    warnings.warn("compare_with_dense is called benchmark now; the next release drops the old name", FutureWarning, 2)
    return benchmark(model, images, rounds)
