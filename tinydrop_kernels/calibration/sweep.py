"""Loss and cost of all policies at once, computed from a table of answers."""

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
PolicyLaw = tuple[Law, Saliency | None]  # None as the saliency means randomly chosen patches


class Judgement(NamedTuple):
    """The losses and the cost of one policy on the images of a table."""

    losses: NDArray[Any]  # int8 (n,)
    cost: float  # as a fraction of the dense model's cost


class Sweep(NamedTuple):
    """Many policies on the images of a table. Arrays are float64 ``(policies,)`` unless stated otherwise."""

    cost: NDArray[Any]  # as a fraction of the dense model's cost
    loss: NDArray[Any]  # mean over the images
    moved: NDArray[Any]  # share of the images with a loss of 1 or -1
    places: NDArray[Any]  # int32 (policies, 4): indices of view, law, blend and second look
    laws: list[list[PolicyLaw]]  # the laws of each view
    blends: tuple[float, ...]

    def policy(self, number: int) -> tuple[int, DropPolicy]:
        """Return the index of a policy's view, and the policy. Random drops are not allowed."""
        view, law, blend, look = self.places[number].tolist()
        (tau, gamma, min_keep, coarsen), saliency = self.laws[view][law]
        assert saliency is not None
        return view, DropPolicy(tau, gamma, min_keep, coarsen, self.blends[blend], SECOND_LOOKS[look], saliency)

    def only(self, wanted: Callable[[Law, Saliency | None], bool], simply: bool = True) -> "Sweep":
        """Return the policies with a ``wanted`` law. ``simply`` leaves out policies with a blend or a second look."""
        laws = [[wanted(*law) for law in laws] for laws in self.laws]
        kept = np.array([laws[view][law] for view, law in self.places[:, :2].tolist()])
        if simply:
            kept &= ~self.places[:, 2:].any(1)
        return self._replace(
            cost=self.cost[kept], loss=self.loss[kept], moved=self.moved[kept], places=self.places[kept]
        )


def judge(table: Table, view: int, policy: DropPolicy, by: str = "flops") -> Judgement:
    """Return the losses and the cost of one policy, image by image.

    Args:
        table: the models' answers.
        view: index of the view that the policy uses.
        policy: the policy. Its ``blend`` must be one of the table's.
        by: the cost, ``"flops"`` or ``"time"``.

    Raises:
        ValueError: the policy needs a reduction or a blend that was not run.
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
    """Return for each image whether it gets a second look, and its answer before that.

    Args:
        view: the view that the policy uses.
        reductions: index of the reduction, one for all images or one per image.
        blend: index of the blend.
        look: the policy's ``second_look``.
    """
    images = np.arange(len(view.predicted))
    answers, sure = view.answers[reductions, blend, images], view.sure[reductions, blend, images]
    patches = np.array([reduction.patches for reduction in view.reductions])[reductions]
    if look is None:
        return np.zeros(answers.shape, bool), answers
    bar_if_agreed, bar = look
    stands = (sure > bar) | ((answers == view.predicted) & (sure > bar_if_agreed))
    return (patches < view.reductions[DENSE].patches) & ~stands, answers


def laws_of(view: View, table: Table, random: bool = False) -> list[PolicyLaw]:
    """Return the laws to judge: each law that only lowers the resolution, and one law per reduction and tau.

    With ``random``, only the laws of the random drops are returned.
    """
    calm = DropPolicy.saliency
    laws: list[PolicyLaw] = []
    if not random:
        # With an infinite gamma the budget is 1 for every min_keep, so one min_keep is enough.
        shapes = [(gamma, floor) for gamma in GAMMAS for floor in FLOORS if gamma < math.inf or floor == FLOORS[0]]
        laws += [(Law(tau, gamma, floor, 1.0), calm) for tau in TAUS for gamma, floor in shapes]
    reductions = [reduction for reduction in view.reductions if reduction.random == random]
    return laws + [
        (law_of(reduction, table.levels, tau), None if random else reduction.saliency or calm)
        for tau in TAUS
        for reduction in reductions
    ]


def sweep(table: Table, by: str = "flops", random: bool = False) -> Sweep:
    """Return all policies that the table can judge: the laws of each view with every blend and every second look.

    Args:
        table: the models' answers.
        by: the cost, ``"flops"`` or ``"time"``.
        random: judge the drops of random patches instead. They are a baseline, and no policy uses them.
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
    """Return cost, sum of losses and sum of absolute losses, ``(policies, 3)``, and the policies' ``places``.

    A law only decides which reduction an image gets. Each reduction is therefore judged once, with every blend and
    second look. The sums of a law are a product of two matrices: the images in each reduction, and their losses there.

    Args:
        table: the models' answers.
        number: index of the view.
        reductions: the reduction of each image under each law, ``(laws, n)``; -1 if the image exits.
        by: the cost, ``"flops"`` or ``"time"``.
    """
    view, n = table.views[number], len(table)
    of_cell, of_guidance = table.costs(number, by)
    looks = len(table.blends) * len(SECOND_LOOKS)
    exits = (reductions < 0).astype(np.float32)
    lost = table.losses(view.predicted).astype(np.float32)
    totals = np.zeros((len(reductions), 3, looks), np.float32)  # sums of loss, absolute loss and second looks
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
        product = torch.from_numpy(members) @ by_look.T  # torch, because NumPy's threads would compete with torch's
        totals[rows] += product.numpy().reshape(-1, 3, looks)
        cost[rows] += members.mean(1) * of_cell[reduction]
    costs = cost[:, None] + totals[:, 2] / n * of_cell[view.reductions[DENSE]]
    sums = np.stack([costs, totals[:, 0], totals[:, 1]], axis=-1).reshape(-1, 3).astype(np.float64)
    places = np.indices((1, len(reductions), len(table.blends), len(SECOND_LOOKS)), np.int32).reshape(4, -1).T
    return sums, places + np.array([number, 0, 0, 0], np.int32)
