"""Statistical tests that the mean loss of a policy is below a bound."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUISANCES = 24  # number of values tried for the share of gains, which is not known
_SURE = 1e-4  # probability that the true share of gains exceeds all values tried; p_value adds it to the result
_TAIL = 6.0  # counts further than this many standard deviations above or below the mean are ignored


def p_value(lost: int, gained: int, images: int, bound: float, can_gain: bool = True) -> float:
    """Return the p-value of the hypothesis that the mean loss is at least ``bound``.

    Losses per image are -1, 0 or 1. A small p-value is evidence that the mean loss is below ``bound``.

    The test is exact. It takes all shares of losses and gains that differ by ``bound``. For each, it computes the
    probability of counts with a score statistic at least as extreme as the observed one. The p-value is the largest
    of these probabilities. Shares of gains that the observed counts rule out are skipped (Berger and Boos 1994).
    Without gains, the p-value is about the tail of a binomial. A betting bound is valid too, but needs two to three
    times as many images (docs/decisions.md).

    Args:
        lost, gained: numbers of images with a loss of 1 and of -1.
        images: number of all images.
        bound: the mean loss of the hypothesis, in (0, 1).
        can_gain: True if a loss can be -1.

    Source: the score statistic is that of Tango, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design" (1998). The exact test is that of Sidik, "Exact unconditional tests for
    testing non-inferiority in matched-pairs design" (2003).
    """
    return _p_value(lost, gained, images, bound, can_gain) if images else 1.0


@lru_cache(maxsize=4096)
def _p_value(lost: int, gained: int, images: int, bound: float, can_gain: bool) -> float:
    seen = float(_score(np.array(lost), np.array(gained), images, bound))
    if seen <= 0:
        return 1.0
    if not can_gain:
        return _chance(seen, 0.0, images, bound)
    most = min((1 - bound) / 2, _least(lambda share: _unlikely(gained / images, share, images)))
    chances = [_chance(seen, share, images, bound) for share in most * np.linspace(0, 1, _NUISANCES) ** 2]
    return min(1.0, max(chances) + _SURE)


def _unlikely(seen: float, share: float, images: int) -> bool:
    """Return True if ``share`` is implausible as the true share of gains, given the observed share ``seen``.

    It is implausible if at most ``seen`` would be observed with a probability below ``_SURE`` (Chernoff's bound).
    """
    if share <= seen:
        return False
    distance = (1 - seen) * math.log((1 - seen) / (1 - share))
    distance += seen * math.log(seen / share) if seen else 0.0
    return images * distance >= -math.log(_SURE)


def _score(lost: NDArray[Any], gained: NDArray[Any], images: int, bound: float) -> NDArray[Any]:
    """Return by how many standard errors the observed mean loss is below ``bound``.

    The standard error is that of a true mean loss of exactly ``bound``.
    """
    slope = (lost + gained) * (1 - bound) - 2 * bound * (images - lost)
    # Maximum-likelihood share of gains under the constraint that the share of losses is larger by exactly `bound`.
    share = (slope + np.sqrt(slope**2 + 8 * images * gained * bound * (1 - bound))) / (4 * images)
    error: NDArray[Any] = np.sqrt(images * (2 * share.clip(0) + bound - bound**2))
    below: NDArray[Any] = (images * bound - (lost - gained)) / error
    return below


def _chance(seen: float, share: float, images: int, bound: float) -> float:
    """Return the probability of a score of at least ``seen``.

    The true share of gains is ``share``, and the true share of losses is ``share + bound``.
    """
    lost, gained = _likely(share + bound, images)[:, None], _likely(share, images)
    even = images - lost - gained
    counted = (even >= 0) & (_score(lost, gained, images, bound) >= seen - 1e-9)
    log = _log_factorials(images)
    ways = log[images] - log[lost] - log[gained] - log[even.clip(0)]
    even_share = max(1 - bound - 2 * share, 1e-300)
    chance = ways + lost * math.log(share + bound) + gained * math.log(max(share, 1e-300)) + even * math.log(even_share)
    return float(np.exp(chance[counted]).sum())


def _likely(share: float, images: int) -> NDArray[Any]:
    """Return the counts that are within ``_TAIL`` standard deviations for ``images`` images at this share."""
    middle, spread = images * share, _TAIL * math.sqrt(images * share)
    return np.arange(max(0, int(middle - spread)), min(images, int(middle + spread + 2 * _TAIL)) + 1)


@lru_cache(maxsize=8)
def _log_factorials(images: int) -> NDArray[Any]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, images + 1)))])


def counts_of(losses: NDArray[Any]) -> tuple[int, int, int]:
    """Return the numbers of losses, gains and images, in the order of :func:`p_value`'s arguments."""
    return int((losses > 0).sum()), int((losses < 0).sum()), len(losses)


def upper_bound(lost: int, gained: int, images: int, confidence: float, can_gain: bool = True) -> float:
    """Return the upper confidence bound, at most 1, on the mean loss of a policy that was fixed beforehand."""
    return _least(lambda bound: p_value(lost, gained, images, bound, can_gain) <= 1 - confidence)


def least_drop(images: int, confidence: float) -> float:
    """Return the smallest accuracy drop that ``images`` images can certify.

    Only a policy that answers every image as the dense model does can reach it.
    """
    return 1.0 if not images else 1 - (1 - confidence) ** (1 / images)


def _least(holds: Callable[[float], bool]) -> float:
    """Return, by bisection, the smallest number in (0, 1) that satisfies ``holds``.

    If a number satisfies ``holds``, all larger numbers must satisfy it too.
    """
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
