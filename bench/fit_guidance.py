"""Guidance models fitted to the target's answers, without labels, against heads that were fitted to labels.

    python bench/fit_guidance.py --data FOLDER [--cache FOLDER] [--out FILE]

The models and images are those of ``bench/accuracy.py``. Heads are fitted to images of the first half of each class and
judged on the second half.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accuracy import GUIDANCE, SETS, TARGET, batches, halves, load
from torch import Tensor
from tqdm import tqdm

import tinydrop_kernels as tdk
from tinydrop_kernels.guidance.fitting import choose_decay, fit_heads

COUNTS = (100, 500, 2000)  # images to fit a head to; all of the first half if there are fewer
WRONG = 0.02  # share of the exits that may be wrong


class Half(NamedTuple):
    """The guidance model's outputs on one half of a set."""

    labels: Tensor  # (images,)
    features: Tensor  # before the classifier, (images, dim)
    logits: Tensor  # of the head that was fitted to labels, (images, classes)


@torch.inference_mode()
def outputs(data: Path, name: str, files: list) -> Half:
    """Return the guidance model's outputs on one half of a set."""
    _, classes, resize = SETS[name]
    guidance = tdk.Guidance(load(data, GUIDANCE, name, classes))
    loaded = tqdm(batches(files, resize, 32), desc=f"{name}, guidance", total=-(-len(files) // 32))
    found = [(labels, guidance.pre_logits(images)) for images, labels in loaded]
    labels, features = map(torch.cat, zip(*found, strict=True))
    return Half(labels, features, guidance.model.get_classifier()(features))


@torch.inference_mode()
def answers(data: Path, name: str, files: list, cache: Path | None) -> Tensor:
    """Return the target's probabilities ``(images, classes)``. Those in the cache are not computed again."""
    stored = cache / f"target-{name}-{files[0][0].stem}-{len(files)}.pt" if cache else None
    if stored and stored.is_file():
        return torch.load(stored, weights_only=True)
    _, classes, resize = SETS[name]
    target = load(data, TARGET, name, classes, img_size=224)
    loaded = tqdm(batches(files, resize, 32), desc=f"{name}, target", total=-(-len(files) // 32))
    found = torch.cat([target(images).softmax(1) for images, _ in loaded])
    if stored:
        stored.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, stored)
    return found


def could_exit(logits: Tensor, labels: Tensor) -> float:
    """Return the largest share of most confident images with at most ``WRONG`` of them wrong."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels)[confidence.argsort(descending=True)].cumsum(0)
    fits = wrong <= WRONG * torch.arange(1, len(labels) + 1)
    return (fits.nonzero().max().item() + 1) / len(labels) if fits.any() else 0.0


def row(name: str, count: str, by: str, decay: str, logits: Tensor, half: Half) -> str:
    right = (logits.argmax(1) == half.labels).double()
    interval = 1.96 * right.std().item() / len(right) ** 0.5
    return (
        f"| {name} | {count} | {by} | {decay} | {right.mean():.1%} ± {100 * interval:.1f} | "
        f"{could_exit(logits, half.labels):.1%} |"
    )


def rows_of(name: str, first: Half, target: Tensor, second: Half) -> list[str]:
    """Return the table's rows of one set. The target's probabilities are those on the first half."""
    truth = F.one_hot(first.labels, target.shape[1]).float()
    found = [row(name, "not here", "labels: the given head", "", second.logits, second)]
    for count in sorted({min(count, len(first.labels)) for count in COUNTS}):
        chosen = np.linspace(0, len(first.labels) - 1, count).round().astype(int)  # evenly from all classes
        learned = {
            "the target's answers": target,
            "the answers and the labels": (target + truth) / 2,
            "labels": truth,
        }
        for by, wanted in learned.items():
            start = time.perf_counter()
            features, own = first.features[chosen], wanted[chosen]
            decay, _ = choose_decay(features, own)
            (head,) = fit_heads(features, own, [decay])
            print(f"{name}, {count} images, {by}: fitted in {time.perf_counter() - start:.1f} s", flush=True)
            found.append(row(name, str(count), by, f"{decay:g}", F.linear(second.features, *head), second))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with backbones, heads and the three sets")
    parser.add_argument("--cache", type=Path, help="folder that keeps the target's answers")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(1, f"no real weights and photographs in {args.data}: nothing measured (docs/accuracy.md)\n")
    text = [
        f"Target {TARGET} at 224 px, guidance {GUIDANCE}, float32; torch {torch.__version__}, timm {timm.__version__}, "
        f"{torch.get_num_threads()} thread(s). Heads are fitted to evenly chosen images of the first half of each "
        "class, and judged on the second half. ± is half of a 95 % interval.",
        "",
        f"Could exit: the largest share of the judged images, most confident first, with at most {WRONG:.0%} of them "
        "wrong. The threshold is picked on the judged images, so it is optimistic for every row.",
        "",
        "| set | images | learns from | weight decay | accuracy | could exit |",
        "|---|---|---|---|---|---|",
    ]
    for name in SETS:
        first, second = halves(args.data / name / "val")
        seen, judged = (outputs(args.data, name, half) for half in (first, second))
        text += rows_of(name, seen, answers(args.data, name, first, args.cache), judged)
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join([*text, ""]))


if __name__ == "__main__":
    main()
