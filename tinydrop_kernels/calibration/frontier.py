"""Accuracy against cost, as numbers and as a picture, for all policies and for simpler methods."""

import csv
import math
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinydrop_kernels.calibration.bounds import counts_of, upper_bound
from tinydrop_kernels.calibration.sweep import Sweep, judge, sweep
from tinydrop_kernels.calibration.table import PLAIN, Table
from tinydrop_kernels.ops import Law, Saliency
from tinydrop_kernels.policy.calibrated import CalibratedPolicy

OURS = "TinyDrop"
POINTS = ("dense", "guidance")
STYLES = {  # the colours differ in brightness, so that a black-and-white print stays readable
    OURS: ("#1b4f9c", "-", 2.2),
    "resolution alone": ("#e08214", "--", 1.6),
    "exits alone": ("#35978f", "-.", 1.6),
    "the paper's drop": ("#b2182b", ":", 1.8),
    "random drop": ("#999999", ":", 1.4),
}


class Point(NamedTuple):
    """A policy's cost and accuracy. Without labels, accuracy means agreement with the dense model."""

    way: str  # the method's name
    by: str  # "flops" or "time"
    cost: float  # as a fraction of the dense model's cost
    score: float  # accuracy, as a fraction
    low: float  # interval of the score; both ends equal the score if there is no interval
    high: float


def frontier(table: Table, chosen: Sequence[CalibratedPolicy] = (), confidence: float = 0.9) -> list[Point]:
    """Return each method's best scores at each cost, and the points of the dense and guidance models.

    The best scores are slightly optimistic, because they are selected on the same images.

    Args:
        table: the models' answers. Costs in time are included if they were measured.
        chosen: policies to show, with two-sided intervals of their score relative to the dense model's.
        confidence: confidence of the intervals.
    """
    dense = float((table.dense == table.labels).mean()) if table.labels is not None else 1.0
    points = []
    for by in ("flops", "time") if table.dense_seconds else ("flops",):
        everything = sweep(table, by)
        for way, wanted in _WAYS.items():
            points += _upper(way, by, everything.only(wanted), dense)
        if any(reduction.random for reduction in table.views[0].reductions):
            points += _upper("random drop", by, sweep(table, by, random=True).only(lambda law, saliency: True), dense)
        points += _upper(OURS, by, everything, dense)
        points.append(Point("dense", by, 1.0, dense, dense, dense))
        for number, view in enumerate(table.views):
            score = dense - float(table.losses(view.predicted).mean())
            points.append(Point("guidance", by, table.costs(number, by)[1], score, score, score))
        points += [_chosen(table, policy, by, dense, confidence) for policy in chosen if policy.certificate.passed]
    return points


def _resolution(law: Law, saliency: Saliency | None) -> bool:
    return law.coarsen == 1 and law.gamma < math.inf


_WAYS: dict[str, Callable[[Law, Saliency | None], bool]] = {
    "exits alone": lambda law, saliency: math.isinf(law.gamma),
    "the paper's drop": lambda law, saliency: math.isinf(law.gamma) or (saliency == PLAIN and law.coarsen == 0),
    "resolution alone": _resolution,
}


def _upper(way: str, by: str, swept: Sweep, dense: float) -> list[Point]:
    """Return, from the cheapest on, every policy that scores better than all cheaper policies."""
    points: list[Point] = []
    for number in np.lexsort((swept.loss, swept.cost)):
        score = dense - float(swept.loss[number])
        if not points or score > points[-1].score:
            points.append(Point(way, by, float(swept.cost[number]), score, score, score))
    return points


def _chosen(table: Table, policy: CalibratedPolicy, by: str, dense: float, confidence: float) -> Point:
    """Return the point of one policy, with a two-sided interval from all images.

    Each side of the interval gets half of the error probability ``1 - confidence``.
    """
    view = [seen.input_size for seen in table.views].index(policy.input_size)
    losses, cost = judge(table, view, policy.policy, by)
    lost, gained, images = counts_of(losses)
    side = (1 + confidence) / 2
    low = -upper_bound(lost, gained, images, side, table.labels is not None)
    high = upper_bound(gained, lost, images, side)
    name = f"certified to lose {100 * policy.certificate.accuracy_drop:g} points"
    return Point(name, by, cost, dense - float(losses.mean()), dense + low, min(1.0, dense + high))


def write_csv(points: Sequence[Point], path: str | os.PathLike[str]) -> None:
    """Write the points as a CSV file with the columns way, by, cost, score, low and high."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Point._fields)
        writer.writerows([*point[:2], *(f"{value:.6g}" for value in point[2:])] for point in points)


def check_drawable() -> None:
    """Raise RuntimeError if matplotlib is not installed."""
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise RuntimeError(
            'the picture needs matplotlib, which is not installed: pip install "tinydrop_kernels[plot]"'
        ) from None


def draw(points: Sequence[Point], path: str | os.PathLike[str], table: Table) -> None:
    """Write a picture of the points. The file's ending (``.png``, ``.svg``) selects the format.

    One panel shows FLOPs. A second panel shows images per second if time was measured.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    check_drawable()
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(point.by for point in points))
    figure = Figure(figsize=(7 * len(kinds), 5), layout="constrained")
    for axes, by in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _draw_one(axes, [point for point in points if point.by == by], by, table)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _draw_one(axes: Any, points: list[Point], by: str, table: Table) -> None:
    def x(cost: float) -> float:
        return 100 * cost if by == "flops" else 1 / (cost * table.dense_seconds)

    ways: dict[str, list[Point]] = {}
    for point in points:
        ways.setdefault(point.way, []).append(point)
    dense = ways["dense"][0].score
    for way, (colour, line, width) in STYLES.items():
        shown = ways.get(way, [])
        if shown:
            # Extend the line to the cost of dense, because a higher cost never forces a lower score.
            steps = [*shown, shown[-1]._replace(cost=max(1.0, shown[-1].cost))]
            axes.plot(
                [x(point.cost) for point in steps],
                [100 * point.score for point in steps],
                line,
                color=colour,
                linewidth=width,
                label=way,
            )
    for way, mark in zip(POINTS, "s^", strict=True):
        shown = ways[way]
        axes.plot([x(p.cost) for p in shown], [100 * p.score for p in shown], mark, color="black", label=way)
    certified = [point for way, shown in ways.items() if way not in (*STYLES, *POINTS) for point in shown]
    for number, point in enumerate(certified):
        errors = [[100 * (point.score - point.low)], [100 * (point.high - point.score)]]
        colour = f"C{(4, 6, 8, 3)[number % 4]}"
        axes.errorbar(x(point.cost), 100 * point.score, errors, fmt="o", color=colour, capsize=4, label=point.way)
    axes.set_xlabel("FLOPs, % of dense" if by == "flops" else "images per second, from the measured time of each part")
    axes.set_ylabel("accuracy, %" if table.labels is not None else "agreement with the dense model, %")
    lowest = min(point.score for way in (OURS, *POINTS) for point in ways[way])
    axes.set_ylim(100 * max(lowest - 0.01, dense - 0.25), 100 * min(1.005, max(p.high for p in points) + 0.005))
    if by == "flops":
        axes.set_xlim(0, 105)
    axes.grid(alpha=0.3)
