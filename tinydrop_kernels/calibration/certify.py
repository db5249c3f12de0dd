"""Choice and certification of a policy from the models' answers and a stated accuracy drop.

The method is fixed-sequence testing (Learn-then-Test, Angelopoulos et al., arXiv 2110.01052). One part of the images
orders the candidate policies. The other part tests the candidates one after the other, each at the full level, until
one fails. The probability that any candidate that passed loses more than stated is at most ``1 - confidence``. This
holds for any number of candidates.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tinydrop_kernels.calibration.bounds import counts_of, least_drop, p_value
from tinydrop_kernels.calibration.sweep import Sweep, judge, sweep
from tinydrop_kernels.calibration.table import Table
from tinydrop_kernels.policy.drop import DropPolicy

ORDERING = 0.2  # share of the images that order the candidates; testing needs most of the images
BAND = 0.05  # width of a band of cost, as a fraction of the dense model's cost; each band gives at most one candidate
UNFIT = 2.0  # a policy that loses more than this many times the stated drop while ordering is not tested


class Candidate(NamedTuple):
    """A policy and the view (guidance model and input size) that it uses."""

    view: int  # index into Table.views
    policy: DropPolicy


class Finding(NamedTuple):
    """The result of testing."""

    chosen: Candidate | None  # the cheapest candidate that passed; None if no candidate passed
    tried: int  # number of candidates tested
    losses: NDArray[Any]  # int8 (tested images,): losses of the chosen policy; empty if there is none
    ordered: int  # number of images that ordered the candidates
    least_drop: float  # smallest accuracy drop that this number of images can certify


def certify(
    table: Table, drop: float, confidence: float, by: str = "flops", seed: int = 0, ordering: float = ORDERING
) -> Finding:
    """Return the cheapest policy that passes the test of losing at most ``drop``.

    Args:
        table: the models' answers. All of its images are used.
        drop: accuracy that may be lost, in (0, 1). Without labels, the share of answers that may differ from the dense
            model's.
        confidence: probability with which the certificate holds, in (0, 1).
        by: the cost, ``"flops"`` or ``"time"``.
        seed: seed of the random split of the images.
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
    """Return the candidates from the most to the least expensive. All are cheaper than dense.

    Each band of cost gives the policy that changed the fewest answers, unless a cheaper policy changed fewer. A lost
    answer counts 1 and a gained one 0.3. Gains count too, because in so few images a gain can be chance. A policy that
    follows the dense model closely is the safest to test. Two other orders certify much less (docs/calibration.md).
    These orders prefer gains, or the cheapest policy that seems to keep the drop.

    Args:
        swept: all policies, judged on the ordering images.
        drop: the stated accuracy drop.
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
        nothing: the result if the first candidate fails.
        images: the answers on the test images.
        candidates: candidates in an order that does not depend on the test images.
        drop, confidence: as for :func:`certify`.
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
    """Return the choice of a plain grid search: the cheapest policy that lost at most ``drop`` on these images.

    This says nothing about the loss on other images. The result is None if no policy cheaper than dense qualifies.
    """
    swept = sweep(table, by)
    cost = np.where((swept.loss <= drop) & (swept.cost < 1), swept.cost, np.inf)
    cheapest = int(cost.argmin())
    return Candidate(*swept.policy(cheapest)) if np.isfinite(cost[cheapest]) else None
