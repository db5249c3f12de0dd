"""Mixes of exits, grids and drops that cost a given share of dense, the same in batches of any size.

What a policy does with an image hangs on the guidance's confidence, and with random weights that means nothing. So the
guidance runs, and its confidences are then replaced by evenly spread ones.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels import DropPolicy, ops
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families.grids import coarser_grids

DISTINCT = 8  # confidences of a mix; the batch sizes that divide it, and its multiples, all have the same mix
EXITS_ABOVE = {100: None, 50: 0.75, 20: 0.5}  # percent of dense FLOPs: tau; nobody, a quarter, half of the images exit
TOLERANCE = 0.02  # of dense FLOPs


def spread(images: int, distinct: int) -> Tensor:
    """The confidences 0.5 / n, 1.5 / n, ... ``(batches, images)`` of the batches of a round; each has some of all."""
    batches = max(1, distinct // images)
    number = min(distinct, batches * images)
    order = torch.arange(images) * batches + torch.arange(batches)[:, None]
    return (order % number + 0.5) / number


class SpreadConfidences:
    """Has a patched model's guidance answer with :func:`spread` confidences; all that it does is done nevertheless.

    The answer lies in one place, and is changed between calls by :meth:`turn_to`: so a CUDA graph replays it too.
    """

    def __init__(self, model: Any, distinct: int):
        self.distinct, self.turn = distinct, 0
        self._answers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        guidance = model.tinydrop.guidance
        guidance.forward = functools.partial(self._answer, guidance.forward)  # a hook would have it run without graphs

    def turn_to(self, turn: int) -> None:
        """From now on the guidance answers as for this batch of the round."""
        self.turn = turn
        for logits, columns in self._answers.values():
            logits[:, 0] = columns[turn % len(columns)]

    def _answer(self, forward: Any, *arguments: Any) -> Any:
        guided = forward(*arguments)
        shape = tuple(guided.logits.shape)
        if shape not in self._answers:
            images, classes = shape
            confidence = spread(images, self.distinct).clamp(min=1 / classes)
            columns = torch.log(confidence * (classes - 1) / (1 - confidence)).to(guided.logits)
            self._answers[shape] = torch.zeros_like(guided.logits), columns
            self.turn_to(self.turn)
        return guided._replace(logits=self._answers[shape][0])


def cost(model: Any, guidance_flops: int, policy: DropPolicy) -> int:
    """FLOPs of a mix's ``DISTINCT`` images, guidance counted, as a report counts them."""
    family, grids = family_of(model), coarser_grids(model.patch_embed.grid_size)
    counts, levels = ops.apply_law(spread(DISTINCT, DISTINCT)[0], grids, policy.law)
    by_grid = ((grid, counts[levels == level].tolist()) for level, grid in enumerate(grids))
    return sum(family.flops(model, own, grid) for grid, own in by_grid if any(own)) + DISTINCT * guidance_flops


def dense_cost(model: Any) -> int:
    """FLOPs of as many images, dense."""
    return family_of(model).dense_flops(model, DISTINCT, model.patch_embed.grid_size)


def policy_of(model: Any, guidance_flops: int, percent: int) -> DropPolicy:
    """Of the policies with the mix's exits, the one whose FLOPs come nearest to so much of dense.

    Args:
        model: a timm model, patched or not.
        guidance_flops: of the guidance model on an image.
        percent: of dense FLOPs, one of ``EXITS_ABOVE``.

    Raises:
        ValueError: none comes within ``TOLERANCE``. Of 100 % one may fall short, where everything is kept: a last block
            that the head reads one token of is cheaper than dense's.
    """

    def with_gamma(log_gamma: float) -> DropPolicy:
        # No second look: random weights are never sure, and all images would go through dense after all.
        return DropPolicy(EXITS_ABOVE[percent], 2.0**log_gamma, 0.05, coarsen=0.6, blend=0.2, second_look=None)

    def error(policy: DropPolicy) -> float:
        return cost(model, guidance_flops, policy) / dense - percent / 100

    dense, low, high = dense_cost(model), -10.0, 10.0
    for _ in range(16):  # the more gamma, the more is spent
        middle = (low + high) / 2
        low, high = (middle, high) if error(with_gamma(middle)) < 0 else (low, middle)
    nearest = min(map(with_gamma, (low, high)), key=lambda policy: abs(error(policy)))
    off = error(nearest)
    if off > TOLERANCE or (off < -TOLERANCE and percent < 100):
        raise ValueError(f"percent: got {percent}, and the nearest mix has {percent + 100 * off:.1f} % of dense FLOPs")
    return nearest
