"""The runs of the models on the calibration images.

The guidance model runs once per input size and saliency, the target once per reduction.
"""

import hashlib
import os
import statistics
from collections.abc import Callable, Iterable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tinydrop_kernels.batches import labelled_batches
from tinydrop_kernels.calibration.provenance import versions
from tinydrop_kernels.calibration.table import (
    BLENDS,
    Reduction,
    Table,
    View,
    drop_reductions,
    law_of,
    named_and_sure,
    whole_reductions,
)
from tinydrop_kernels.engine import TinyDrop, steps
from tinydrop_kernels.engine.stopwatch import timed
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families.flops import count_flops
from tinydrop_kernels.guidance.model import Guidance, GuidanceError, GuidanceOutput
from tinydrop_kernels.ops import Saliency
from tinydrop_kernels.ops.types import Grid, TimmModule
from tinydrop_kernels.patching import patch, unpatch
from tinydrop_kernels.policy.drop import CALM, DropPolicy
from tinydrop_kernels.policy.fingerprint import fingerprint_of

SIDES = (1.0, 6 / 7, 5 / 7, 4 / 7)  # guidance input sizes as fractions of its own: 224, 192, 160 and 128 px of 224 px
STRIDE = 32  # guidance input sizes are rounded to a multiple of this many pixels


def resolutions(guidance: Guidance) -> list[Guidance]:
    """Return a guidance model at its own input size and at each smaller size in ``SIDES`` that it accepts."""
    found = {guidance.input_size: guidance}
    for side in SIDES[1:]:
        height, width = (STRIDE * round(pixels * side / STRIDE) for pixels in guidance.input_size)
        size = height, width
        if min(size) < 2 * STRIDE or size in found:
            continue
        try:
            found[size] = guidance.at_size(size)
        except GuidanceError:  # some transformers accept a single input size
            continue
    return list(found.values())


@torch.inference_mode()
def collect(
    model: TimmModule,
    guidances: Sequence[Guidance],
    loader: Iterable[Any],
    cache: Path | None = None,
    *,
    random_drop: bool = False,
    progress: bool = False,
) -> tuple[Table, str]:
    """Run the models on all images, and restore the target afterwards.

    Args:
        model: the target, in eval mode and not patched.
        guidances: guidance models with the target's classes.
        loader: batches of images normalised for the target, or of images and labels.
        cache: a folder that keeps the answers, so that no batch runs twice. With None, answers are not kept. Several
            models and data sets may share a folder, because file names depend on the images and the models' weights.
        random_drop: also run the target on randomly chosen patches, as a baseline for the frontier's picture.
        progress: show a progress bar.

    Returns:
        The answers, and a hash of the images.

    Raises:
        ValueError: there are no images, labels are out of range or missing in some batches, or the model is in
            training mode.
        Any error of ``patch``.
    """
    if model.training:
        raise ValueError("model: it is in training mode, expected one in eval mode")
    patch(model, guidances[0], DropPolicy())
    try:
        with torch.inference_mode(False):  # some guidance models need autograd, which refuses inference-mode tensors
            asking = _Collector(model, guidances, cache, random_drop)
        total = len(loader) if isinstance(loader, Sized) else None
        batches = labelled_batches(loader, asking.classes)
        for images, labels in tqdm(batches, total=total, unit="batch", disable=None if progress else True):
            asking.add(images, labels)
        return asking.table(), asking.contents.hexdigest()[:16]
    finally:
        unpatch(model)


class _Collector:
    """A collector that runs the models batch by batch and builds the table of their answers."""

    def __init__(self, model: TimmModule, guidances: Sequence[Guidance], cache: Path | None, random_drop: bool):
        self.model = model
        self.tinydrop: TinyDrop = model.tinydrop
        self.classes, self.cache, self.random_drop = model.tinydrop.num_classes, cache, random_drop
        self.weight = next(model.parameters())
        identity = fingerprint_of(model, self.classes)
        self.key = _hash(self.weight.device, *self.tinydrop.normalization, versions(), identity)
        self.views = [
            _GuidanceView(
                number, sized.to(self.weight.device, self.weight.dtype), sized is guidance, self._key_of(sized)
            )
            for number, guidance in enumerate(guidances)
            for sized in resolutions(guidance)
        ]
        self.contents = hashlib.sha256()
        self.levels: list[Grid] = []
        self.labels: list[NDArray[Any]] = []
        self.dense: list[NDArray[Any]] = []
        self.said: list[list[tuple[NDArray[Any], ...]]] = [[] for _ in self.views]
        self.costs: dict[_Subject, list[_Cost]] = {}

    def _key_of(self, guidance: Guidance) -> str:
        return _hash(self.key, guidance.fingerprint, guidance.input_size, guidance.mean, guidance.std)

    def add(self, images: Tensor, labels: NDArray[np.int32] | None) -> None:
        """Run the models on one batch, except for answers that are in the cache."""
        digest = hashlib.sha256(np.ascontiguousarray(images.float().numpy(force=True)).data)
        self.contents.update(digest.digest())
        batch = _Batch(images.to(self.weight.device, self.weight.dtype), digest.hexdigest()[:24], {})
        self.tinydrop.check(batch.images)
        if labels is not None:
            self.labels.append(labels)
        levels = self.tinydrop.levels(family_of(self.model).grid_size(self.model, batch.images))
        if self.levels not in ([], levels):
            raise ValueError(f"loader: got images of the grid {levels[0]} after others, expected images of one size")
        self.levels = levels
        dense = self._kept(None, self.key, "dense", batch, lambda: _Answer(*timed(self.tinydrop.dense, batch.images)))
        self.dense.append(dense.logits.argmax(1).int().numpy(force=True))
        whole = {
            reduction: self._of_reduction(self.views[0], reduction, batch) for reduction in whole_reductions(levels)
        }
        for view, said in zip(self.views, self.said, strict=True):
            guided = self._kept(view, view.key, "guidance", batch, partial(self._of_guidance, view, batch))
            drops = {reduction: self._of_reduction(view, reduction, batch) for reduction in self._drops(view)}
            said.append(_reduced(guided.logits, [answer.logits for answer in (whole | drops).values()]))

    def _drops(self, view: "_GuidanceView") -> list[Reduction]:
        """Return the reductions that drop patches. Only a guidance model at its own input size has any.

        Other sizes are left out, because the dropped patches depend on the guidance model's input size.
        """
        return drop_reductions(self.levels, self.random_drop) if view.own_size else []

    def _guided(self, view: "_GuidanceView", saliency: Saliency, batch: "_Batch") -> tuple[GuidanceOutput, float]:
        """Return the guidance model's output for a batch and the seconds it took. Repeated calls reuse the output."""
        self.tinydrop.guidance = view.guidance
        asked = view, saliency
        if asked not in batch.guided:
            guide = partial(steps.guide, self.tinydrop, policy=DropPolicy(saliency=saliency))
            batch.guided[asked] = timed(guide, batch.images)
        return batch.guided[asked]

    def _of_guidance(self, view: "_GuidanceView", batch: "_Batch") -> "_Answer":
        guided, seconds = self._guided(view, CALM, batch)
        return _Answer(guided.logits, seconds)

    def _of_reduction(self, view: "_GuidanceView", reduction: Reduction, batch: "_Batch") -> "_Answer":
        def ask() -> _Answer:
            saliency = reduction.saliency or CALM
            guided, _ = self._guided(view, saliency, batch)
            if reduction.random:
                draws = torch.Generator().manual_seed(int(batch.name[:8], 16))
                drawn = torch.rand(len(batch.images), *self.levels[reduction.level], generator=draws)
                guided = GuidanceOutput(guided.logits, None, drawn.to(batch.images.device))
            policy = DropPolicy(*law_of(reduction, self.levels), blend=0, second_look=None, saliency=saliency)
            plan = steps.plan(self.tinydrop, batch.images, guided, policy)
            logits, seconds = timed(lambda images: steps.run(self.tinydrop, images, plan), batch.images)
            report = self.tinydrop.report()
            flops = (report.flops - report.guidance_flops) / report.images
            return _Answer(logits, seconds, flops, report.dense_flops / report.images)

        of_target = reduction.saliency is None and not reduction.random
        kept = "whole" if of_target else "random" if reduction.random else "-".join(map(str, reduction.saliency or ()))
        name = f"{reduction.level}-{reduction.patches}-{kept}"
        return self._kept(reduction, self.key if of_target else view.key, name, batch, ask)

    def _kept(
        self, subject: "_Subject", key: str, name: str, batch: "_Batch", ask: Callable[[], "_Answer"]
    ) -> "_Answer":
        """Return the answer from the cache, or call ``ask`` and cache its answer. Record the cost in either case."""
        path = self.cache and self.cache / key / f"{batch.name}-{name}.pt"
        if path and path.is_file():
            answer = _Answer(**torch.load(path, map_location=self.weight.device, weights_only=True))
        else:
            answer = ask()
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}.part")
                torch.save(answer._asdict(), part)
                part.replace(path)  # atomic: an interruption must not leave half a file in the cache
        _, *costs = answer
        self.costs.setdefault(subject, []).append(_Cost(len(batch.images), *costs))
        return answer

    def table(self) -> Table:
        """Return the answers on all batches."""
        if not self.dense:
            raise ValueError("loader: got no images")
        seconds = {subject: _seconds(costs) for subject, costs in self.costs.items()}
        flops = {subject: costs[0].flops for subject, costs in self.costs.items() if isinstance(subject, Reduction)}
        views = []
        for view, said in zip(self.views, self.said, strict=True):
            predicted, confidence, answers, sure = (np.concatenate(parts, axis=-1) for parts in zip(*said, strict=True))
            guidance = view.guidance
            views.append(
                View(
                    guidance=view.number,
                    input_size=guidance.input_size,
                    predicted=predicted,
                    confidence=confidence,
                    reductions=(*whole_reductions(self.levels), *self._drops(view)),
                    answers=answers,
                    sure=sure,
                    flops=count_flops(guidance.model, (guidance.in_chans, *guidance.input_size)),
                    seconds=seconds[view],
                )
            )
        return Table(
            levels=self.levels,
            blends=BLENDS,
            dense=np.concatenate(self.dense),
            labels=np.concatenate(self.labels) if self.labels else None,
            views=tuple(views),
            flops=flops,
            seconds={reduction: seconds[reduction] for reduction in flops},
            dense_flops=self.costs[whole_reductions(self.levels)[0]][0].dense,
            dense_seconds=seconds[None],
        )


class _GuidanceView(NamedTuple):
    """A guidance model at one input size."""

    number: int  # the model's place in the list given to collect()
    guidance: Guidance
    own_size: bool  # True if this is the model's own input size
    key: str  # cache folder of the answers that depend on this view


_Subject: TypeAlias = (
    _GuidanceView | Reduction | None
)  # the owner of a cost: a guidance model, a reduction of the target, or None for the dense target


class _Answer(NamedTuple):
    """A model's answer for a batch, with its costs. The cache holds it as a dict with these keys."""

    logits: Tensor
    seconds: float
    flops: float = 0.0  # FLOPs per image of a reduction
    dense: float = 0.0  # FLOPs per image of timm's own forward


class _Cost(NamedTuple):
    """The costs of an answer. They are stored without its logits, which are large and soon not needed."""

    images: int
    seconds: float
    flops: float
    dense: float


class _Batch(NamedTuple):
    """Images on the model's device, a name derived from their contents, and the guidance outputs computed so far."""

    images: Tensor
    name: str
    guided: dict[tuple[_GuidanceView, Saliency], tuple[GuidanceOutput, float]]


def _reduced(guidance: Tensor, targets: list[Tensor]) -> tuple[NDArray[Any], ...]:
    """Return the arrays ``predicted``, ``confidence``, ``answers`` and ``sure`` of a :class:`View` for one batch."""
    confidence, predicted = guidance.float().softmax(dim=1).max(dim=1)
    pairs = [[named_and_sure(target, guidance, blend) for blend in BLENDS] for target in targets]
    answers, sure = (torch.stack([torch.stack([pair[i] for pair in row]) for row in pairs]) for i in (0, 1))
    return tuple(tensor.numpy(force=True) for tensor in (predicted.int(), confidence, answers, sure))


def _seconds(costs: list[_Cost]) -> float:
    """Return the seconds per image, as the median over the batches of the first batch's size.

    Batches of other sizes are ignored, because the time per image depends on the batch size.
    """
    size = costs[0].images
    return statistics.median(cost.seconds for cost in costs if cost.images == size) / size


def _hash(*parts: Any) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
