"""How sure one may be, from so many images, that a loss is below a bound."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUISANCES = 24  # values of the unknown share of gains that are tried
_SURE = 1e-4  # chance that the share of gains is larger than those tried; it is added to the p-value
_TAIL = 6.0  # standard deviations, beyond which no count is looked at


def p_value(lost: int, gained: int, images: int, bound: float, can_gain: bool = True) -> float:
    """p-value of "the mean of losses in {-1, 0, 1} is at least ``bound``": small where they speak against it.

    An exact test: the largest chance, under the shares of losses and gains whose difference is ``bound``, of counts
    that speak as strongly against it by the score statistic. Shares of gains that are refuted by those seen are not
    tried (Berger and Boos 1994). Where there cannot be gains, it is about the tail of a binomial. (A betting bound
    holds as well and needs two to three times the images: docs/decisions.md.)

    Args:
        lost, gained: numbers of losses of 1 and of -1.
        images: number of all.
        bound: in (0, 1).
        can_gain: whether a loss can be -1 at all.

    Source: the score of Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design" (1998), made exact as Sidik, "Exact unconditional tests for testing non-inferiority in
    matched-pairs design" (2003), makes it.
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
    """Whether at most so many of the images would gain with a chance below ``_SURE``, by Chernoff's bound."""
    if share <= seen:
        return False
    distance = (1 - seen) * math.log((1 - seen) / (1 - share))
    distance += seen * math.log(seen / share) if seen else 0.0
    return images * distance >= -math.log(_SURE)


def _score(lost: NDArray[Any], gained: NDArray[Any], images: int, bound: float) -> NDArray[Any]:
    """By how many standard errors the mean loss is below the bound, were it the bound."""
    slope = (lost + gained) * (1 - bound) - 2 * bound * (images - lost)
    # the most likely share of gains where that of losses is larger by the bound
    share = (slope + np.sqrt(slope**2 + 8 * images * gained * bound * (1 - bound))) / (4 * images)
    error: NDArray[Any] = np.sqrt(images * (2 * share.clip(0) + bound - bound**2))
    below: NDArray[Any] = (images * bound - (lost - gained)) / error
    return below


def _chance(seen: float, share: float, images: int, bound: float) -> float:
    """Chance of a score of at least ``seen`` where ``share`` of the images gain, and ``share + bound`` lose."""
    lost, gained = _likely(share + bound, images)[:, None], _likely(share, images)
    even = images - lost - gained
    counted = (even >= 0) & (_score(lost, gained, images, bound) >= seen - 1e-9)
    log = _log_factorials(images)
    ways = log[images] - log[lost] - log[gained] - log[even.clip(0)]
    even_share = max(1 - bound - 2 * share, 1e-300)
    chance = ways + lost * math.log(share + bound) + gained * math.log(max(share, 1e-300)) + even * math.log(even_share)
    return float(np.exp(chance[counted]).sum())


def _likely(share: float, images: int) -> NDArray[Any]:
    """Counts that so many images may give at this share."""
    middle, spread = images * share, _TAIL * math.sqrt(images * share)
    return np.arange(max(0, int(middle - spread)), min(images, int(middle + spread + 2 * _TAIL)) + 1)


@lru_cache(maxsize=8)
def _log_factorials(images: int) -> NDArray[Any]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, images + 1)))])


def counts_of(losses: NDArray[Any]) -> tuple[int, int, int]:
    """Numbers of losses, of gains and of images, as :func:`p_value` takes them."""
    return int((losses > 0).sum()), int((losses < 0).sum()), len(losses)


def upper_bound(lost: int, gained: int, images: int, confidence: float, can_gain: bool = True) -> float:
    """What the mean loss of a policy that was fixed beforehand is below, at this confidence; at most 1."""
    return _least(lambda bound: p_value(lost, gained, images, bound, can_gain) <= 1 - confidence)


def least_drop(images: int, confidence: float) -> float:
    """The smallest drop that so many images can certify: of a policy that answers all of them as dense does."""
    return 1.0 if not images else 1 - (1 - confidence) ** (1 / images)


def _least(holds: Callable[[float], bool]) -> float:
    """The least number in (0, 1) for which something holds that holds for all larger ones, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
