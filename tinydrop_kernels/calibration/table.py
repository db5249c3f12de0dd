"""The models' answers on a set of images, reduced to the numbers that judging a policy needs."""

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
PLAIN = Saliency()  # the paper's saliency: Grad-CAM of one class
CALM_KEEPS = ((2, 0.75), (3, 0.75), (2, 0.5))  # level, and fraction of that level's patches that is kept
PLAIN_KEEPS = ((0, 0.56), (0, 0.39), (0, 0.25))


class Reduction(NamedTuple):
    """A fixed grid and a fixed number of kept patches."""

    level: int  # of the target's patch grid; 0 is the dense grid
    patches: int  # kept patches
    saliency: Saliency | None = None  # ranks the patches; None if all are kept, or if they are chosen at random
    random: bool = False  # the kept patches are chosen at random: a baseline, not a policy


DENSE = 0  # index of the dense grid with all patches, which is the first reduction of every view


def whole_reductions(levels: Sequence[Grid]) -> list[Reduction]:
    """Return one reduction per level that keeps all patches of its grid."""
    return [Reduction(level, rows * columns) for level, (rows, columns) in enumerate(levels)]


def drop_reductions(levels: Sequence[Grid], random: bool = False) -> list[Reduction]:
    """Return the reductions that drop patches.

    Patches of coarser grids are ranked by the default saliency, and patches of the dense grid by the paper's.
    """
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
    """Return the law that gives this reduction to every image that does not exit, at any confidence."""
    (rows, columns), dense = levels[reduction.level], levels[0][0] * levels[0][1]
    if reduction.patches == rows * columns:
        return Law(tau, 0.0, reduction.patches / dense, 1.0)
    budget = reduction.patches / dense
    return Law(tau, 0.0, budget, math.log(rows * columns / dense) / math.log(budget))


@dataclass(frozen=True)
class View:
    """One guidance model at one input size, with the target's answers on the same ``n`` images."""

    guidance: int  # index of the guidance model
    input_size: tuple[int, int]
    predicted: NDArray[Any]  # int32 (n,): top class of the guidance model
    confidence: NDArray[Any]  # float32 (n,): its probability
    reductions: tuple[Reduction, ...]
    answers: NDArray[Any]  # int32 (reductions, blends, n): top class of the blended answer
    sure: NDArray[Any]  # float32 (reductions, blends, n): probability of that class
    flops: float  # FLOPs per image of the guidance model
    seconds: float  # seconds per image of the guidance model

    def decisions(self, law: Law, saliency: Saliency | None, levels: Sequence[Grid]) -> NDArray[Any] | None:
        """Return the index of each image's reduction, -1 if the image exits.

        The result is None if the law needs a reduction that was not run, because such a policy cannot be judged.

        Args:
            law: the policy's law.
            saliency: the policy's saliency; None means randomly chosen patches.
            levels: the grids of the target.
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
    """All answers of the models, image by image, and their costs."""

    levels: list[Grid]
    blends: tuple[float, ...]
    dense: NDArray[Any]  # int32 (n,): top class of the dense target
    labels: NDArray[Any] | None  # int32 (n,)
    views: tuple[View, ...]
    flops: dict[Reduction, float]  # FLOPs per image of the target; they do not depend on the saliency
    seconds: dict[Reduction, float]  # seconds per image of the target
    dense_flops: float  # FLOPs per image of timm's own forward
    dense_seconds: float  # seconds per image of timm's own forward

    def __len__(self) -> int:
        return len(self.dense)

    def take(self, images: NDArray[Any]) -> "Table":
        """Return the table of some of the images.

        Args:
            images: indices of the images.
        """
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
        """Return the loss of each answer against the dense model, int8 of the same shape.

        With labels, the loss is 1 if only the dense model is right, -1 if only this answer is right, and 0 otherwise.
        Without labels, the loss is 1 if the two differ and 0 otherwise.

        Args:
            predicted: the answers as class numbers, ``(..., n)``.
        """
        if self.labels is None:
            differ: NDArray[Any] = (predicted != self.dense).astype("int8")
            return differ
        right = (predicted == self.labels).astype("int8")
        lost: NDArray[Any] = (self.dense == self.labels).astype("int8") - right
        return lost

    def costs(self, view: int, by: str) -> tuple[dict[Reduction, float], float]:
        """Return the cost per image of each reduction of a view, and of its guidance model.

        Costs are fractions of the dense model's cost.

        Args:
            view: index of the view.
            by: ``"flops"``, or ``"time"`` for the measured time.
        """
        seen = self.views[view]
        if by == "flops":
            of_cell, of_guidance, dense = self.flops, seen.flops, self.dense_flops
        else:
            of_cell, of_guidance, dense = self.seconds, seen.seconds, self.dense_seconds
        return {reduction: of_cell[reduction] / dense for reduction in seen.reductions}, of_guidance / dense


def named_and_sure(target: Tensor, guidance: Tensor, blend: float) -> tuple[Tensor, Tensor]:
    """Return the top class of a blended answer, int32 ``(n,)``, and its probability, as the engine computes them.

    Args:
        target, guidance: logits ``(n, classes)`` of the same images.
        blend: weight of the guidance model in [0, 1).
    """
    sure, named = blended(target, guidance, blend).float().softmax(dim=1).max(dim=1)
    return named.int(), sure
