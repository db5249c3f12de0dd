"""What the models answered on a set of images, reduced to what every policy can be judged by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from tinydrop_kernels.ops import Law, Saliency, apply_law
from tinydrop_kernels.ops.types import ROUNDING_SLACK, Grid
from tinydrop_kernels.policy.blend import blended
from tinydrop_kernels.policy.drop import CALM

BLENDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
PLAIN = Saliency()  # the paper's: Grad-CAM of one class
CALM_KEEPS = ((2, 0.75), (3, 0.75), (2, 0.5))  # level of the grid, and how much of it is kept
PLAIN_KEEPS = ((0, 0.56), (0, 0.39), (0, 0.25))


class Reduction(NamedTuple):
    """A fixed reduction: so many patches of one grid. ``saliency`` is None where all of them are kept."""

    level: int
    patches: int
    saliency: Saliency | None = None
    random: bool = False  # which are kept is drawn: a yardstick, not a policy


DENSE = 0  # the first reduction of every table: the dense grid, whole


def whole_reductions(levels: Sequence[Grid]) -> list[Reduction]:
    """Each grid with all of its patches: resolution alone."""
    return [Reduction(level, rows * columns) for level, (rows, columns) in enumerate(levels)]


def drop_reductions(levels: Sequence[Grid], random: bool = False) -> list[Reduction]:
    """Some of the patches of a grid: coarser grids with the default saliency, the dense one with the paper's."""
    reductions = []
    for keeps, saliency in ((CALM_KEEPS, CALM), (PLAIN_KEEPS, PLAIN)):
        for level, keep in keeps:
            if level < len(levels):
                rows, columns = levels[level]
                count = max(1, math.ceil(keep * rows * columns - ROUNDING_SLACK))
                reductions.append(Reduction(level, count, saliency))
    randomly = [
        reduction._replace(saliency=None, random=True) for reduction in reductions if random and reduction.level == 0
    ]
    return list(dict.fromkeys(reductions + randomly))


def law_of(reduction: Reduction, levels: Sequence[Grid], tau: float | None = None) -> Law:
    """The law that gives every image that does not exit this reduction, whatever the guidance's confidence."""
    (rows, columns), dense = levels[reduction.level], levels[0][0] * levels[0][1]
    if reduction.patches == rows * columns:
        return Law(tau, 0.0, reduction.patches / dense, 1.0)
    budget = reduction.patches / dense
    return Law(tau, 0.0, budget, math.log(rows * columns / dense) / math.log(budget))


@dataclass(frozen=True)
class View:
    """One guidance model at one input size, and the target's answers beside it. ``n`` images, class numbers int32."""

    guidance: int  # which of the guidance models
    input_size: tuple[int, int]
    predicted: NDArray[Any]  # (n,)
    confidence: NDArray[Any]  # float32 (n,)
    reductions: tuple[Reduction, ...]
    answers: NDArray[Any]  # (reductions, blends, n): the class that the blended answer names
    sure: NDArray[Any]  # float32 (reductions, blends, n): its probability
    flops: float  # of the guidance model on an image
    seconds: float

    def decisions(self, law: Law, saliency: Saliency | None, levels: Sequence[Grid]) -> NDArray[Any] | None:
        """The reduction of each image, -1 where it exits; None if the law asks for one that was not run.

        So a policy is judged only where what it would do was done. Without a saliency the patches are drawn at random.
        """
        counts, of_level = apply_law(torch.from_numpy(self.confidence), levels, law)
        found = torch.full_like(counts, -2)
        found[counts == 0] = -1
        for number, reduction in enumerate(self.reductions):
            if reduction.random == (saliency is None) and reduction.saliency in (None, saliency):
                found[(counts == reduction.patches) & (of_level == reduction.level)] = number
        return None if bool((found == -2).any()) else found.numpy()


@dataclass(frozen=True)
class Table:
    """All that was asked of the models, image by image."""

    levels: list[Grid]
    blends: tuple[float, ...]
    dense: NDArray[Any]  # int32 (n,): the class that the model itself names
    labels: NDArray[Any] | None  # int32 (n,)
    views: tuple[View, ...]
    flops: dict[Reduction, float]  # of the target on an image; a reduction costs the same whatever its saliency
    seconds: dict[Reduction, float]
    dense_flops: float  # timm's own forward
    dense_seconds: float

    def __len__(self) -> int:
        return len(self.dense)

    def take(self, images: NDArray[Any]) -> "Table":
        """The same of some of the images, by number."""
        views = tuple(
            replace(
                view,
                predicted=view.predicted[images],
                confidence=view.confidence[images],
                answers=view.answers[..., images],
                sure=view.sure[..., images],
            )
            for view in self.views
        )
        labels = None if self.labels is None else self.labels[images]
        return replace(self, dense=self.dense[images], labels=labels, views=views)

    def losses(self, predicted: NDArray[Any]) -> NDArray[Any]:
        """What answering so loses on each image, int8 of the same shape.

        With labels 1 where only the dense model is right, -1 where only this answer is; without, 1 where they differ.
        """
        if self.labels is None:
            differ: NDArray[Any] = (predicted != self.dense).astype("int8")
            return differ
        right = (predicted == self.labels).astype("int8")
        lost: NDArray[Any] = (self.dense == self.labels).astype("int8") - right
        return lost

    def costs(self, view: int, by: str) -> tuple[dict[Reduction, float], float]:
        """What each reduction of a view costs on an image, and its guidance, over the dense model's cost.

        Args:
            view: its number.
            by: ``"flops"``, or ``"time"`` as it was measured.
        """
        seen = self.views[view]
        if by == "flops":
            of_cell, of_guidance, dense = self.flops, seen.flops, self.dense_flops
        else:
            of_cell, of_guidance, dense = self.seconds, seen.seconds, self.dense_seconds
        return {reduction: of_cell[reduction] / dense for reduction in seen.reductions}, of_guidance / dense


def named_and_sure(target: Tensor, guidance: Tensor, blend: float) -> tuple[Tensor, Tensor]:
    """Return the class that a blended answer names, int32 ``(n,)``, and its probability, as the engine sees them.

    Args:
        target, guidance: logits ``(n, classes)`` of the same images.
        blend: weight of the guidance in [0, 1).
    """
    sure, named = blended(target, guidance, blend).float().softmax(dim=1).max(dim=1)
    return named.int(), sure
