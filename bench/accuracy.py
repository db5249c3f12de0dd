"""Accuracy and FLOPs on real photographs with real weights, end to end through ``patch``.

    python bench/accuracy.py --data FOLDER [--images N] [--cache FOLDER] [--out FILE]

There are three sets of images, which are easy, middle and hard (docs/accuracy.md). The patched model runs every image
once with every fixed reduction. Exits, blend and second look are computed from these answers, so many policies can be
compared without further runs. Policies are chosen on the first half of each class and judged on the second half.
"""

import argparse
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import steps
from tinydrop_kernels.families.grids import coarser_grids

SETS = {"imagenette": ("easy", 10, 224), "caltech100": ("middle", 100, 256), "cars66": ("hard", 66, 256)}
TARGET, GUIDANCE = "vit_small_patch14_dinov2", "mobilenetv2_100"
CAM = tdk.Saliency()
DROPS = (0.56, 0.39, 0.25)
SIDES = (0.875, 0.75, 0.625, 0.5)
BOTH = ((0.75, 0.75), (0.625, 0.75), (0.75, 0.5))  # side of the grid over the dense side, and fraction kept


class Way(NamedTuple):
    """A fixed reduction."""

    side: float  # side of the grid over the side of the dense grid
    keep: float  # fraction of the grid's patches that is kept
    saliency: tdk.Saliency  # ranks the patches

    @property
    def policy(self) -> tdk.DropPolicy:
        budget = self.side**2 * self.keep
        coarsen = 2 * math.log(self.side) / math.log(budget) if budget < 1 else 0.0
        policy = tdk.DropPolicy.fixed(budget, coarsen=min(1.0, coarsen))
        return tdk.DropPolicy(**(vars(policy) | {"saliency": self.saliency}))


DENSE = Way(1.0, 1.0, CAM)
FAMILIES = {
    "exits alone": [DENSE],
    "the paper's drop": [Way(1.0, keep, CAM) for keep in DROPS],
    "resolution alone": [Way(side, 1.0, CAM) for side in SIDES],
    "resolution and drop": [Way(side, keep, tdk.DropPolicy.saliency) for side, keep in BOTH],
}
WAYS = [way for ways in FAMILIES.values() for way in ways]


def load(data: Path, name: str, images: str, classes: int, **options: Any) -> Any:
    """Return a backbone with the head that was fitted to one set of images."""
    model = timm.create_model(name, num_classes=classes, **options)
    weights = load_file(data / "backbones" / f"{name}.safetensors")
    weights |= load_file(data / "heads" / f"{name}.{images}.safetensors")
    model.load_state_dict({k: w.float() if w.is_floating_point() else w for k, w in weights.items()})
    return model.eval()


def halves(folder: Path) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Return the (file, class) pairs of the first half of each class and of the second half, by file name."""
    first, second = [], []
    for label, path in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        names = sorted(path.iterdir())
        first += [(name, label) for name in names[: len(names) // 2]]
        second += [(name, label) for name in names[len(names) // 2 :]]
    return first, second


def thinned(files: list, count: int | None) -> list:
    step = max(1, len(files) // count) if count else 1
    return files[::step][:count]


def batches(files, resize: int, size: int):
    transform = create_transform(
        (3, 224, 224),
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        crop_pct=224 / resize,
    )
    for start in range(0, len(files), size):
        chunk = files[start : start + size]
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file, _ in chunk])
        yield images, torch.tensor([label for _, label in chunk])


class Answers(NamedTuple):
    """The models' answers on one half of a set."""

    labels: np.ndarray  # (images,)
    guidance: np.ndarray  # probabilities (images, classes)
    target: dict[Way, np.ndarray]  # probabilities (images, classes) of each reduction
    flops: dict[Way, float]  # FLOPs per image of the target
    guidance_flops: float  # FLOPs per image
    dense_flops: float  # FLOPs per image of timm's own forward


@torch.inference_mode()
def combined_answers(
    data: Path, name: str, files: list, ways: list[Way], batch_size: int, cache: Path | None, dtype: torch.dtype
) -> Answers:
    """Return the answers of the patched model with every reduction. Answers in the cache are not computed again."""
    _, classes, resize = SETS[name]
    key = f"{name}-{files[0][0].stem}-{len(files)}-{str(dtype).removeprefix('torch.')}"
    stored = cache / f"{key}.pt" if cache else None
    known = torch.load(stored, weights_only=True) if stored and stored.is_file() else {}
    missing = [way for way in ways if str(way) not in known]
    if missing or "guidance" not in known:
        model = load(data, TARGET, name, classes, img_size=224)
        tdk.patch(model, load(data, GUIDANCE, name, classes)).to(dtype)
        tinydrop = model.tinydrop
        found: dict[str, list] = {str(way): [] for way in missing} | {"guidance": []}
        for images, _ in tqdm(batches(files, resize, batch_size), desc=name, total=-(-len(files) // batch_size)):
            images = images.to(dtype)
            guided = steps.guide(tinydrop, images)
            found["guidance"].append(guided.logits.float().softmax(1))
            for way in missing:
                tinydrop.policy = way.policy
                found[str(way)].append(
                    steps.run(tinydrop, images, steps.plan(tinydrop, images, guided)).float().softmax(1)
                )
                report = tinydrop.report()
                known[f"flops {way}"] = (report.flops - report.guidance_flops) / report.images
                known["guidance flops"] = report.guidance_flops / report.images
                known["dense flops"] = report.dense_flops / report.images
        known |= {what: torch.cat(rows) for what, rows in found.items()}
        if stored:
            stored.parent.mkdir(parents=True, exist_ok=True)
            torch.save(known, stored)
    return Answers(
        np.array([label for _, label in files]),
        known["guidance"].numpy(),
        {way: known[str(way)].numpy() for way in ways},
        {way: known[f"flops {way}"] for way in ways},
        known["guidance flops"],
        known["dense flops"],
    )


class Setting(NamedTuple):
    """A reduction with an exit threshold, a blend and a second look."""

    way: Way
    tau: float | None
    blend: float = 0.0
    second_look: tuple[float, float] | None = None

    def __str__(self) -> str:
        side, keep, _ = self.way
        told = ["dense" if side == keep == 1 else f"grid {side:g}, keep {keep:g}"]
        told.append("no exits" if self.tau is None else f"tau {self.tau:g}")
        if self.blend:
            told.append(f"blend {self.blend:g}")
        if self.second_look:
            told.append("second look {:g}, {:g}".format(*self.second_look))
        return ", ".join(told)


TAUS = (*np.round(np.arange(0.3, 1.0, 0.025), 3).tolist(), 0.99, None)
BLENDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SECOND_LOOKS = (None, *itertools.product((0.0, 0.15, 0.3, 0.5), (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)))
METHODS = {  # the choices of each method: reductions, blends, second looks
    "exits alone": (FAMILIES["exits alone"], (0.0,), (None,)),
    "the paper's drop": ([DENSE, *FAMILIES["the paper's drop"]], (0.0,), (None,)),
    "resolution alone": ([DENSE, *FAMILIES["resolution alone"]], (0.0,), (None,)),
    "resolution and drop": ([DENSE, *FAMILIES["resolution alone"], *FAMILIES["resolution and drop"]], (0.0,), (None,)),
    "the same, blended": ([DENSE, *FAMILIES["resolution alone"], *FAMILIES["resolution and drop"]], BLENDS, (None,)),
    "the same, second look": (
        [*FAMILIES["resolution alone"], *FAMILIES["resolution and drop"]],
        BLENDS,
        SECOND_LOOKS,
    ),
}


def judged(answers: Answers, setting: Setting) -> tuple[np.ndarray, float]:
    """Return which answers are correct, and the FLOPs per image as a fraction of the dense FLOPs."""
    way, tau, blend, second_look = setting
    confidence = answers.guidance.max(1)
    stays = np.ones_like(confidence, dtype=bool) if tau is None else confidence <= tau
    flops = np.full(len(stays), answers.flops[way])
    return answered(answers, answers.target[way], flops, stays, blend, second_look, may_doubt=way != DENSE)


def judged_by_law(answers: Answers, policy: tdk.DropPolicy) -> tuple[np.ndarray, float]:
    """Return what :func:`judged` returns, for a policy whose law only lowers the resolution."""
    assert policy.coarsen == 1
    ways = FAMILIES["exits alone"] + FAMILIES["resolution alone"]
    grids = coarser_grids((16, 16))
    counts, levels = tdk.ops.apply_law(torch.from_numpy(answers.guidance.max(1)), grids, policy.law)
    level = levels.numpy()
    target = np.stack([answers.target[way] for way in ways])[level, np.arange(len(level))]
    flops = np.array([answers.flops[way] for way in ways])[level]
    return answered(answers, target, flops, counts.numpy() > 0, policy.blend, policy.second_look, may_doubt=level > 0)


def answered(answers, target, flops, stays, blend, second_look, may_doubt) -> tuple[np.ndarray, float]:
    """Apply exits, blend and second look to the target's answers. Return what :func:`judged` returns."""
    reduced = (1 - blend) * target + blend * answers.guidance
    predicted = reduced.argmax(1)
    again = np.zeros_like(stays)
    if second_look is not None:
        bar_if_agreed, bar = second_look
        sure = reduced.max(1)
        agrees = predicted == answers.guidance.argmax(1)
        again = stays & may_doubt & ~((sure > bar) | (agrees & (sure > bar_if_agreed)))
        dense = (1 - blend) * answers.target[DENSE] + blend * answers.guidance
        predicted = np.where(again, dense.argmax(1), predicted)
    predicted = np.where(stays, predicted, answers.guidance.argmax(1))
    cost = answers.guidance_flops + (stays * flops).mean() + again.mean() * answers.flops[DENSE]
    return predicted == answers.labels, cost / answers.dense_flops


def dense_right(answers: Answers) -> np.ndarray:
    return answers.target[DENSE].argmax(1) == answers.labels


def choose(answers: Answers, method: str, drop: float) -> Setting:
    """Return a method's cheapest setting whose loss on these images, plus one standard error, is at most ``drop``.

    The margin is needed because one of so many settings would seem to lose nothing by luck.
    """
    ways, blends, second_looks = METHODS[method]
    dense = dense_right(answers).astype(float)
    best, least = Setting(DENSE, None), float("inf")
    for setting in map(Setting._make, itertools.product(ways, TAUS, blends, second_looks)):
        right, cost = judged(answers, setting)
        lost = dense - right
        if cost < least and lost.mean() + lost.std() / math.sqrt(len(lost)) <= drop:
            best, least = setting, cost
    return best


def interval(values: np.ndarray) -> str:
    """Return half of the 95 % interval of a mean, in percentage points."""
    return f"{100 * 1.96 * values.std() / math.sqrt(len(values)):.1f}"


def reductions_table(answers: dict[str, Answers]) -> list[str]:
    """Return a table of each fixed reduction's accuracy without exits, on the second halves.

    Accuracies in brackets are those with a blend of 0.2.
    """
    rows = ["| | FLOPs of the target | " + " | ".join(answers) + " |", "|---|---|" + "---|" * len(answers)]
    for name, ways in FAMILIES.items():
        for way in ways:
            cells = []
            for found in answers.values():
                plain, _ = judged(found, Setting(way, None))
                mixed, _ = judged(found, Setting(way, None, 0.2))
                cells.append(f"{plain.mean():.1%} ± {interval(plain)} ({mixed.mean():.1%})")
            first = next(iter(answers.values()))
            label = "dense" if way == DENSE else f"{name}: grid {way.side:g}, keep {way.keep:g}"
            rows.append(f"| {label} | {first.flops[way] / first.dense_flops:.2f} | {' | '.join(cells)} |")
    return rows


def default_table(first: dict[str, Answers], second: dict[str, Answers]) -> list[str]:
    """Return a table of the default policy on both halves. The policy was chosen with knowledge of the first halves."""
    rows = ["| | FLOPs saved | accuracy lost (points), judged | first half: saved, lost |", "|---|---|---|---|"]
    for name, found in second.items():
        right, cost = judged_by_law(found, tdk.DropPolicy())
        lost = dense_right(found).astype(float) - right
        seen, seen_cost = judged_by_law(first[name], tdk.DropPolicy())
        seen_lost = 100 * (dense_right(first[name]).mean() - seen.mean())
        rows.append(
            f"| {name} ({SETS[name][0]}) | {1 - cost:.1%} | {100 * lost.mean():+.1f} ± {interval(lost)} "
            f"| {1 - seen_cost:.1%}, {seen_lost:+.1f} |"
        )
    return rows


def methods_table(chosen: Answers, second: Answers, drop: float) -> list[str]:
    """Return a table of each method's cheapest setting for a drop, chosen on the first half, judged on the second."""
    rows = ["| | FLOPs saved | accuracy lost (points), judged | chosen on the first half |", "|---|---|---|---|"]
    dense = dense_right(second)
    for method in METHODS:
        setting = choose(chosen, method, drop)
        right, cost = judged(second, setting)
        lost = dense.astype(float) - right
        rows.append(f"| {method} | {1 - cost:.1%} | {100 * lost.mean():+.1f} ± {interval(lost)} | {setting} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with backbones, heads and the three sets")
    parser.add_argument("--images", type=int, help="largest number of images of each half (default: all)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of both models")
    parser.add_argument("--cache", type=Path, help="folder that keeps the answers, so that they are not computed again")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(1, f"no real weights and photographs in {args.data}: nothing measured (docs/accuracy.md)\n")

    first: dict[str, Answers] = {}
    second: dict[str, Answers] = {}
    for name in SETS:
        for half, found in zip(halves(args.data / name / "val"), (first, second), strict=True):
            files = thinned(half, args.images)
            options = (args.batch_size, args.cache, getattr(torch, args.dtype))
            found[name] = combined_answers(args.data, name, files, WAYS, *options)
    counts = ", ".join(f"{name} {len(first[name].labels)} + {len(second[name].labels)}" for name in SETS)
    text = [
        f"Target {TARGET} at 224 px (257 tokens), guidance {GUIDANCE}, {args.dtype}; torch {torch.__version__}, timm "
        f"{timm.__version__}. Images to choose from + to judge on: {counts}. ± is half of a 95 % interval.",
        "",
        "## No exits (second halves; in brackets with a blend of 0.2)",
        "",
        *reductions_table(second),
        "",
        f"## The default policy: {tdk.DropPolicy()}",
        "",
        *default_table(first, second),
        "",
    ]
    for drop in (0.01, 0.005):
        for name in SETS:
            text += [f"## {name} ({SETS[name][0]}): cheapest for a drop of {100 * drop:g} points", ""]
            text += [*methods_table(first[name], second[name], drop), ""]
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
