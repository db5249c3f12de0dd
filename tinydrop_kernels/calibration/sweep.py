"""Every policy's loss and cost at once, from a table of answers."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tinydrop_kernels.calibration.table import DENSE, Table, View, law_of
from tinydrop_kernels.ops import Law, Saliency
from tinydrop_kernels.policy.drop import DropPolicy

TAUS = (*np.round(np.arange(0.3, 0.96, 0.05), 2).tolist(), 0.97, 0.99, None)
GAMMAS = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
FLOORS = (0.25, 0.4, 0.56)
SECOND_LOOKS = (None, *itertools.product((0.0, 0.15, 0.3, 0.5), (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)))

Look = tuple[float, float] | None
PolicyLaw = tuple[Law, Saliency | None]  # without a saliency the patches are drawn at random


class Judgement(NamedTuple):
    """A policy on the images of a table."""

    losses: NDArray[Any]  # int8 (n,)
    cost: float  # over the dense model's


class Sweep(NamedTuple):
    """Many policies on the images of a table; each array is float64 ``(policies,)``."""

    cost: NDArray[Any]  # over the dense model's
    loss: NDArray[Any]  # mean
    moved: NDArray[Any]  # share of the images on which something is lost or gained
    places: NDArray[Any]  # int32 (policies, 4): view, law, blend, second look
    laws: list[list[PolicyLaw]]  # of each view
    blends: tuple[float, ...]

    def policy(self, number: int) -> tuple[int, DropPolicy]:
        """A policy and the view it looks with; not of random drops."""
        view, law, blend, look = self.places[number].tolist()
        (tau, gamma, min_keep, coarsen), saliency = self.laws[view][law]
        assert saliency is not None
        return view, DropPolicy(tau, gamma, min_keep, coarsen, self.blends[blend], SECOND_LOOKS[look], saliency)

    def only(self, wanted: Callable[[Law, Saliency | None], bool], simply: bool = True) -> "Sweep":
        """The policies of some laws; ``simply`` without blend and second look."""
        laws = [[wanted(*law) for law in laws] for laws in self.laws]
        kept = np.array([laws[view][law] for view, law in self.places[:, :2].tolist()])
        if simply:
            kept &= ~self.places[:, 2:].any(1)
        return self._replace(
            cost=self.cost[kept], loss=self.loss[kept], moved=self.moved[kept], places=self.places[kept]
        )


def judge(table: Table, view: int, policy: DropPolicy, by: str = "flops") -> Judgement:
    """One policy, image by image.

    Args:
        table: the answers.
        view: which of its views the policy looks with.
        policy: its ``blend`` must be one of the table's.
        by: ``"flops"`` or ``"time"``.

    Raises:
        ValueError: the policy asks for what was not run.
    """
    seen = table.views[view]
    reductions = seen.decisions(policy.law, policy.saliency, table.levels)
    if reductions is None or policy.blend not in table.blends:
        raise ValueError(f"policy: got {policy}, which asks for reductions or blends that were not run")
    blend, images = table.blends.index(policy.blend), np.arange(len(table))
    answers = np.where(reductions < 0, seen.predicted, seen.answers[reductions, blend, images])
    again = _doubtful(seen, reductions, blend, policy.second_look)[0] & (reductions >= 0)
    answers = np.where(again, seen.answers[DENSE, blend], answers)
    of_cell, of_guidance = table.costs(view, by)
    prices = np.array([of_cell[reduction] for reduction in seen.reductions])
    cost = of_guidance + float((prices[reductions] * (reductions >= 0)).mean() + again.mean() * prices[DENSE])
    return Judgement(table.losses(answers), cost)


def _doubtful(view: View, reductions: Any, blend: Any, look: Look) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return whether answers go for a second look, and the answers; ``reductions`` of all images, or one of each."""
    images = np.arange(len(view.predicted))
    answers, sure = view.answers[reductions, blend, images], view.sure[reductions, blend, images]
    patches = np.array([reduction.patches for reduction in view.reductions])[reductions]
    if look is None:
        return np.zeros(answers.shape, bool), answers
    bar_if_agreed, bar = look
    stands = (sure > bar) | ((answers == view.predicted) & (sure > bar_if_agreed))
    return (patches < view.reductions[DENSE].patches) & ~stands, answers


def laws_of(view: View, table: Table, random: bool = False) -> list[PolicyLaw]:
    """Resolution alone by every law, and each reduction whatever the confidence; of random drops the latter alone."""
    calm = DropPolicy.saliency
    laws: list[PolicyLaw] = []
    if not random:
        # whatever the floor, an infinite gamma spends everything
        shapes = [(gamma, floor) for gamma in GAMMAS for floor in FLOORS if gamma < math.inf or floor == FLOORS[0]]
        laws += [(Law(tau, gamma, floor, 1.0), calm) for tau in TAUS for gamma, floor in shapes]
    reductions = [reduction for reduction in view.reductions if reduction.random == random]
    return laws + [
        (law_of(reduction, table.levels, tau), None if random else reduction.saliency or calm)
        for tau in TAUS
        for reduction in reductions
    ]


def sweep(table: Table, by: str = "flops", random: bool = False) -> Sweep:
    """All policies that the table can judge: laws of each view, with every blend and every second look.

    Args:
        table: the answers.
        by: ``"flops"`` or ``"time"``.
        random: the drops of random patches, which no policy makes, in their place.
    """
    n, parts, all_laws = len(table), [], []
    for number, view in enumerate(table.views):
        known = [(law, view.decisions(*law, table.levels)) for law in laws_of(view, table, random)]
        laws = [law for law, reductions in known if reductions is not None]
        all_laws.append(laws)
        if laws:
            parts.append(_of_view(table, number, np.stack([c.astype(np.int8) for _, c in known if c is not None]), by))
    sums = np.concatenate([part[0] for part in parts])
    places = np.concatenate([part[1] for part in parts])
    return Sweep(sums[:, 0], sums[:, 1] / n, sums[:, 2] / n, places, all_laws, table.blends)


def _of_view(table: Table, number: int, reductions: NDArray[Any], by: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Cost, and sums of loss and of its size, ``(policies, 3)``, and their places; ``reductions`` is ``(laws, n)``.

    A law only says which reduction an image is in. So each reduction is judged once with every blend and second look,
    and what a law comes to is a product of two matrices: which images are in it, and what each loses there.
    """
    view, n = table.views[number], len(table)
    of_cell, of_guidance = table.costs(number, by)
    looks = len(table.blends) * len(SECOND_LOOKS)
    exits = (reductions < 0).astype(np.float32)
    lost = table.losses(view.predicted).astype(np.float32)
    totals = np.zeros((len(reductions), 3, looks), np.float32)  # loss, its size, second looks
    totals[:, 0] = (exits @ lost)[:, None]
    totals[:, 1] = (exits @ np.abs(lost))[:, None]
    cost = np.full(len(reductions), of_guidance)
    for place, reduction in enumerate(view.reductions):
        inside = reductions == place
        rows = inside.any(1)
        if not rows.any():
            continue
        judged = np.empty((3, looks, n), np.float32)
        for column, (blend, look) in enumerate(itertools.product(range(len(table.blends)), SECOND_LOOKS)):
            again, answers = _doubtful(view, place, blend, look)
            judged[0, column] = table.losses(np.where(again, view.answers[DENSE, blend], answers))
            judged[2, column] = again
        np.abs(judged[0], out=judged[1])
        members = inside[rows].astype(np.float32)
        by_look = torch.from_numpy(judged).view(3 * looks, n)
        product = torch.from_numpy(members) @ by_look.T  # by torch's threads: NumPy has others, which would fight them
        totals[rows] += product.numpy().reshape(-1, 3, looks)
        cost[rows] += members.mean(1) * of_cell[reduction]
    costs = cost[:, None] + totals[:, 2] / n * of_cell[view.reductions[DENSE]]
    sums = np.stack([costs, totals[:, 0], totals[:, 1]], axis=-1).reshape(-1, 3).astype(np.float64)
    places = np.indices((1, len(reductions), len(table.blends), len(SECOND_LOOKS)), np.int32).reshape(4, -1).T
    return sums, places + np.array([number, 0, 0, 0], np.int32)
