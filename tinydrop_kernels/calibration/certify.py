"""From a table of answers and a stated drop to a policy: candidates in order on one part, tested on the other.

Fixed-sequence testing (Learn-then-Test, Angelopoulos et al., arXiv 2110.01052): one part of the images puts candidates
into an order, the other tests them one after the other, each at the full level, until one fails. The chance that any of
those before it loses more than was stated is at most ``1 - confidence``, however many there were.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinydrop_kernels.calibration.bounds import counts_of, least_drop, p_value
from tinydrop_kernels.calibration.sweep import Sweep, judge, sweep
from tinydrop_kernels.calibration.table import Table
from tinydrop_kernels.policy.drop import DropPolicy

ORDERING = 0.2  # share of the images that order the candidates: most of them are needed to test
BAND = 0.05  # of the dense model's cost: from each band one candidate
UNFIT = 2.0  # times the stated drop: who loses so many of the images that order is not tested


class Candidate(NamedTuple):
    """A policy, and which view of the table it looks with."""

    view: int
    policy: DropPolicy


class Finding(NamedTuple):
    """What testing came to."""

    chosen: Candidate | None  # the cheapest that passed
    tried: int  # candidates
    losses: NDArray[Any]  # int8 (tested images,): the chosen policy's, empty if there is none
    ordered: int  # images
    least_drop: float  # the smallest that so many images could certify at all


def certify(
    table: Table, drop: float, confidence: float, by: str = "flops", seed: int = 0, ordering: float = ORDERING
) -> Finding:
    """The cheapest policy of which the images say, at this confidence, that it loses at most ``drop``.

    Args:
        table: the answers, all of whose images are used.
        drop: of accuracy, or share of answers unlike the dense model's where the table has no labels; in (0, 1).
        confidence: in (0, 1).
        by: the cost, ``"flops"`` or ``"time"``.
        seed: of the random parting of the images.
        ordering: share of the images that order the candidates.
    """
    shuffled = np.random.default_rng(seed).permutation(len(table))
    parted = round(ordering * len(table))
    first, second = table.take(shuffled[:parted]), table.take(shuffled[parted:])
    least = least_drop(len(second), confidence)
    nothing = Finding(None, 0, np.zeros(0, np.int8), len(first), least)
    if not len(first) or least > drop:
        return nothing
    return in_sequence(nothing, second, in_order(sweep(first, by), drop), drop, confidence)


def in_order(swept: Sweep, drop: float) -> list[Candidate]:
    """Candidates from the dearest to the cheapest, all cheaper than dense.

    From each band of the cost the one that changed the fewest answers, unless a cheaper one changed fewer: the losses
    above all, but gains count as well, for so small a part shows either by chance, and what follows the dense model
    closely is safest to test. (To prefer gains, or the cheapest that seems to keep the drop, was tried and certifies
    much less: docs/calibration.md.)

    Args:
        swept: policies on the images that order them.
        drop: the stated one.
    """
    lost, gained = (swept.moved + swept.loss) / 2, (swept.moved - swept.loss) / 2
    changed = np.where(lost <= UNFIT * drop, lost + 0.3 * gained, np.inf)
    band = np.floor(swept.cost / BAND)
    found: list[int] = []
    for number in sorted(set(band[swept.cost < 1].tolist())):
        inside = np.where((band == number) & (swept.cost < 1), changed, np.inf)
        closest = int(inside.argmin())
        if np.isfinite(inside[closest]) and all(changed[closest] <= changed[cheaper] for cheaper in found):
            found.append(closest)
    return [Candidate(*swept.policy(number)) for number in reversed(found)]


def in_sequence(
    nothing: Finding, images: Table, candidates: list[Candidate], drop: float, confidence: float
) -> Finding:
    """Test candidates in their order until one fails.

    Args:
        nothing: what is known before the first.
        images: the answers on the images that test.
        candidates: in an order that these images had no part in.
        drop, confidence: as of :func:`certify`.
    """
    result = nothing
    for candidate in candidates:
        losses = judge(images, *candidate).losses
        result = result._replace(tried=result.tried + 1)
        if p_value(*counts_of(losses), drop, images.labels is not None) > 1 - confidence:
            break
        result = result._replace(chosen=candidate, losses=losses)
    return result


def uncertified_best(table: Table, drop: float, by: str = "flops") -> Candidate | None:
    """What a plain grid search takes: the cheapest policy that lost at most ``drop`` on these very images.

    Nothing is known of what it loses on others. None where no policy is cheaper than dense.
    """
    swept = sweep(table, by)
    cost = np.where((swept.loss <= drop) & (swept.cost < 1), swept.cost, np.inf)
    cheapest = int(cost.argmin())
    return Candidate(*swept.policy(cheapest)) if np.isfinite(cost[cheapest]) else None
