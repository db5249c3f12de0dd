"""Validity, cost and speed of the calibration's certificates, on real photographs with real weights.

    python bench/calibration.py --data FOLDER --cache FOLDER [--splits N] [--out FILE]

The models' answers and the cache are those of ``bench/accuracy.py``. Each set is split into two random halves many
times. One half calibrates a policy, and the other half shows how much accuracy the policy loses.
"""

import argparse
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from accuracy import GUIDANCE, SETS, TARGET, WAYS, Answers, combined_answers, halves
from tqdm import tqdm

from tinydrop_kernels.calibration.bounds import p_value
from tinydrop_kernels.calibration.certify import Candidate, certify, uncertified_best
from tinydrop_kernels.calibration.sweep import judge, sweep
from tinydrop_kernels.calibration.table import BLENDS, Reduction, Table, View, named_and_sure
from tinydrop_kernels.families.grids import coarser_grids
from tinydrop_kernels.ops.types import ROUNDING_SLACK

DROP, CONFIDENCE = 0.01, 0.9
LARGE = 5000  # number of images of the timed sweep


def table_of(halves_of_set: list[Answers]) -> Table:
    """Return the answers on both halves of a set as one table."""
    levels = coarser_grids((16, 16))
    guidance = torch.from_numpy(np.concatenate([half.guidance for half in halves_of_set])).log()
    confidence, predicted = guidance.softmax(1).max(1)
    cells, answers, sure = [], [], []
    for way in WAYS:
        level = [rows for rows, _ in levels].index(round(16 * way.side))
        patches = int(np.ceil(way.keep * levels[level][0] * levels[level][1] - ROUNDING_SLACK))
        cells.append(Reduction(level, patches, None if way.keep == 1 else way.saliency))
        target = torch.from_numpy(np.concatenate([half.target[way] for half in halves_of_set])).log()
        pairs = [named_and_sure(target, guidance, blend) for blend in BLENDS]
        answers.append(np.stack([named.numpy() for named, _ in pairs]))
        sure.append(np.stack([probability.numpy() for _, probability in pairs]))
    one = halves_of_set[0]
    size, answers_array = (224, 224), np.stack(answers)
    flops = one.guidance_flops
    view = View(
        0, size, predicted.int().numpy(), confidence.numpy(), tuple(cells), answers_array, np.stack(sure), flops, 0
    )
    labels = np.concatenate([half.labels for half in halves_of_set]).astype(np.int32)
    target_flops = {cell: one.flops[way] for cell, way in zip(cells, WAYS, strict=True)}
    return Table(levels, BLENDS, answers_array[0, 0], labels, (view,), target_flops, {}, one.dense_flops, 0)


class Outcome(NamedTuple):
    """The result on one half of a calibration on the other half."""

    saved: float  # fraction of the dense FLOPs
    drop: float  # accuracy lost, as a fraction


def outcome(chosen: Candidate | None, rest: Table) -> Outcome:
    if chosen is None:
        return Outcome(0, 0)
    judged = judge(rest, *chosen)
    return Outcome(1 - judged.cost, float(judged.losses.mean()))


def splits(table: Table, count: int) -> dict[str, list[Outcome]]:
    """Choose policies on random halves, certified and by plain grid search, and return their outcomes on the others."""
    found: dict[str, list[Outcome]] = {"certified": [], "grid search": []}
    for seed in tqdm(range(count), leave=False):
        shuffled = np.random.default_rng(seed).permutation(len(table))
        seen, rest = table.take(shuffled[: len(table) // 2]), table.take(shuffled[len(table) // 2 :])
        found["certified"].append(outcome(certify(seen, DROP, CONFIDENCE, seed=seed).chosen, rest))
        found["grid search"].append(outcome(uncertified_best(seen, DROP), rest))
    return found


def splits_table(found: dict[str, dict[str, list[Outcome]]]) -> list[str]:
    rows = [
        "| set | chosen by | splits with a drop above 1 point | mean drop, points | FLOPs saved, mean (quartiles) | "
        "nothing certified |",
        "|---|---|---|---|---|---|",
    ]
    for name, methods in found.items():
        for method, outcomes in methods.items():
            saved, drops = np.array([o.saved for o in outcomes]), np.array([o.drop for o in outcomes])
            low, high = np.quantile(saved, (0.25, 0.75))
            rows.append(
                f"| {name} | {method} | {(drops > DROP).mean():.1%} | {100 * drops.mean():+.2f} | {saved.mean():.1%} "
                f"({low:.1%} to {high:.1%}) | {(saved == 0).mean():.1%} |"
            )
    return rows


def all_images_table(tables: dict[str, Table], seeds: int) -> list[str]:
    """Return a table of the FLOPs saved with all images: certified, uncertified best, and best that could pass."""
    rows = [
        "| set | images | certified | other splits, median (quartiles) | uncertified best | best that could pass |",
        "|---|---|---|---|---|---|",
    ]
    for name, table in tables.items():
        saved = []
        for seed in range(seeds):
            chosen = certify(table, DROP, CONFIDENCE, seed=seed).chosen
            saved.append(0.0 if chosen is None else 1 - judge(table, *chosen).cost)
        low, middle, high = np.quantile(saved, (0.25, 0.5, 0.75))
        best = uncertified_best(table, DROP)
        rough = 0.0 if best is None else 1 - judge(table, *best).cost
        rows.append(
            f"| {name} | {len(table)} | {saved[0]:.1%} | {middle:.1%} ({low:.1%} to {high:.1%}) | {rough:.1%} | "
            f"{1 - attainable(table):.1%} |"
        )
    return rows


def attainable(table: Table) -> float:
    """Return the cost of the cheapest policy that would pass if the test images had the losses of all images."""
    swept, images = sweep(table), round(0.8 * len(table))
    for number in np.argsort(swept.cost):
        loss, moved = swept.loss[number], swept.moved[number]
        if loss < DROP:
            lost, gained = round((moved + loss) / 2 * images), round((moved - loss) / 2 * images)
            if p_value(lost, gained, images, DROP) <= 1 - CONFIDENCE:
                return float(swept.cost[number])
    return 1.0


def sweep_speed(table: Table) -> str:
    """Return time and memory of a sweep over many images and four input sizes of the guidance model, in words."""
    large = table.take(np.random.default_rng(0).integers(0, len(table), LARGE))
    view = large.views[0]
    # Only a guidance model at its own input size has reductions that drop patches.
    whole = [number for number, cell in enumerate(view.reductions) if cell.saliency is None]
    smaller = replace(
        view, reductions=tuple(view.reductions[i] for i in whole), answers=view.answers[whole], sure=view.sure[whole]
    )
    large = replace(large, views=(view, smaller, smaller, smaller))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    swept = sweep(large)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"{len(swept.cost)} policies on {LARGE} images in {seconds:.1f} s with {torch.get_num_threads()} threads; peak "
        f"memory of the process {peak / 2**20:.2f} GB, {before / 2**20:.2f} GB of it before the sweep."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with backbones, heads and the three sets")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the answers of bench/accuracy.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="dtype of both models")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(1, f"no real weights and photographs in {args.data}: nothing measured (docs/accuracy.md)\n")

    tables = {}
    for name in SETS:
        options = (WAYS, args.batch_size, args.cache, getattr(torch, args.dtype))
        tables[name] = table_of(
            [combined_answers(args.data, name, half, *options) for half in halves(args.data / name / "val")]
        )
    speed = sweep_speed(next(iter(tables.values())))  # first, because peak memory is that of the whole process
    text = [
        f"Target {TARGET} at 224 px, guidance {GUIDANCE}, {args.dtype}; torch {torch.__version__}, timm "
        f"{timm.__version__}. A drop of {100 * DROP:g} points at {CONFIDENCE:.0%} confidence.",
        "",
        f"## {args.splits} random splits: calibrated on one half of a set, judged on the other",
        "",
        *splits_table({name: splits(table, args.splits) for name, table in tables.items()}),
        "",
        "## All images of a set",
        "",
        *all_images_table(tables, 20),
        "",
        "## The sweep",
        "",
        speed,
        "",
    ]
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
