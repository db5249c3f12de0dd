"""Mixes of exits, grids and drops that cost a given percentage of the dense FLOPs, at any batch size.

A policy's effect on an image depends on the guidance model's confidence, which is meaningless with random weights. The
guidance model therefore runs, and its confidences are then replaced by evenly spread ones.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from tinydrop_kernels import DropPolicy, ops
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families.grids import coarser_grids

DISTINCT = 8  # number of confidences; batch sizes that divide it or are its multiples have the same mix
EXITS_ABOVE = {100: None, 50: 0.75, 20: 0.5}  # percent of dense FLOPs: tau; 0, 1/4 and 1/2 of the images exit
TOLERANCE = 0.02  # allowed error of a mix, as a fraction of the dense FLOPs


def spread(images: int, distinct: int) -> Tensor:
    """Return the confidences 0.5 / n, 1.5 / n, ... of a round, ``(batches, images)``.

    Each batch has both low and high confidences.
    """
    batches = max(1, distinct // images)
    number = min(distinct, batches * images)
    order = torch.arange(images) * batches + torch.arange(batches)[:, None]
    return (order % number + 0.5) / number


class SpreadConfidences:
    """A replacement of the guidance model's answers by :func:`spread` confidences. The guidance model still runs.

    The answer stays in one tensor, which :meth:`turn_to` changes between calls, so that a CUDA graph can replay it.
    """

    def __init__(self, model: Any, distinct: int):
        self.distinct, self.turn = distinct, 0
        self._answers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        guidance = model.tinydrop.guidance
        # A replaced forward and not a hook, because hooks turn CUDA graphs off.
        guidance.forward = functools.partial(self._answer, guidance.forward)

    def turn_to(self, turn: int) -> None:
        """Make the guidance model answer for batch number ``turn`` of the round."""
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
    """Return the FLOPs of ``DISTINCT`` images, guidance included, as a report counts them."""
    family, grids = family_of(model), coarser_grids(model.patch_embed.grid_size)
    counts, levels = ops.apply_law(spread(DISTINCT, DISTINCT)[0], grids, policy.law)
    by_grid = ((grid, counts[levels == level].tolist()) for level, grid in enumerate(grids))
    return sum(family.flops(model, own, grid) for grid, own in by_grid if any(own)) + DISTINCT * guidance_flops


def dense_cost(model: Any) -> int:
    """Return the dense FLOPs of ``DISTINCT`` images."""
    return family_of(model).dense_flops(model, DISTINCT, model.patch_embed.grid_size)


def policy_of(model: Any, guidance_flops: int, percent: int) -> DropPolicy:
    """Return the policy with the mix's exits whose FLOPs are closest to the given percentage of dense.

    Args:
        model: a timm model, patched or not.
        guidance_flops: FLOPs per image of the guidance model.
        percent: percentage of the dense FLOPs, a key of ``EXITS_ABOVE``.

    Raises:
        ValueError: no policy is within ``TOLERANCE``. A mix of 100 % may cost less, because the last block is cheaper
            than dense if the head reads a single token.
    """

    def with_gamma(log_gamma: float) -> DropPolicy:
        # No second look, because random weights are never confident and every image would go through dense.
        return DropPolicy(EXITS_ABOVE[percent], 2.0**log_gamma, 0.05, coarsen=0.6, blend=0.2, second_look=None)

    def error(policy: DropPolicy) -> float:
        return cost(model, guidance_flops, policy) / dense - percent / 100

    dense, low, high = dense_cost(model), -10.0, 10.0
    for _ in range(16):  # bisection, because the FLOPs grow with gamma
        middle = (low + high) / 2
        low, high = (middle, high) if error(with_gamma(middle)) < 0 else (low, middle)
    nearest = min(map(with_gamma, (low, high)), key=lambda policy: abs(error(policy)))
    off = error(nearest)
    if off > TOLERANCE or (off < -TOLERANCE and percent < 100):
        raise ValueError(f"percent: got {percent}, and the nearest mix has {percent + 100 * off:.1f} % of dense FLOPs")
    return nearest
