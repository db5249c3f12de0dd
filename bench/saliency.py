"""Insertion and deletion scores, which show whether the target needs the patches that a guidance model finds salient.

    python bench/saliency.py --data FOLDER [--images N] [--out FILE]

The scores are those of RISE (Petsiuk et al. 2018, arXiv 1806.07421, section 4.2), with patches in place of pixels.
Nothing is blurred or greyed, because the target can leave patches out. Insertion keeps the most salient fraction of the
patches. Deletion removes that fraction and keeps the rest. Each score is the area under the curve of the target's
probability over the fraction kept or removed. A good ranking has a high insertion and a low deletion score. For
comparison, patches are also ranked by nearness to the center and at random.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import accuracy
import numpy as np
import timm
import torch
from tqdm import tqdm

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import steps
from tinydrop_kernels.guidance.model import GuidanceOutput
from tinydrop_kernels.ops.saliency import closeness

GUIDANCE = ("mobilenetv2_100", "resnet18", "tf_efficientnet_lite0")
SALIENCY = {"Grad-CAM": tdk.Saliency(), "the default": tdk.DropPolicy.saliency}
KEEPS = (1 / 256, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # starts at one patch, because the target needs at least one


class Curves(NamedTuple):
    """The target's answers at each fraction of ``KEEPS``. Arrays are ``(images, len(KEEPS))``."""

    probability: np.ndarray  # probability of the dense model's top class
    right: np.ndarray  # 1 if the top class is the label, 0 otherwise

    def area(self, values: np.ndarray) -> np.ndarray:
        """Return the area under each image's curve. The fraction removed gives the same area as the fraction kept."""
        widths = np.diff(np.array(KEEPS)) / (KEEPS[-1] - KEEPS[0])
        return ((values[:, 1:] + values[:, :-1]) / 2 * widths).sum(1)


def maps_of(tinydrop, images: torch.Tensor, saliency: tdk.Saliency) -> torch.Tensor:
    """Return the guidance model's saliency at the target's grid, float32 ``(batch, rows, columns)``."""
    tinydrop.policy = replace(tdk.DropPolicy.fixed(1.0), saliency=saliency)
    plan = steps.plan(tinydrop, images)
    return plan.selection.saliency.view(len(images), *plan.levels[0])


def seen(tinydrop, images: torch.Tensor, maps: torch.Tensor, keep: float) -> torch.Tensor:
    """Return the target's probabilities ``(batch, classes)`` on the fraction ``keep`` with the highest map values."""
    tinydrop.policy = tdk.DropPolicy.fixed(keep)
    nothing = images.new_zeros(len(images), tinydrop.guidance.num_classes)  # unused: nothing exits or blends
    return (
        steps.run(tinydrop, images, steps.plan(tinydrop, images, GuidanceOutput(nothing, None, maps)))
        .float()
        .softmax(1)
    )


@torch.inference_mode()
def curves_of(
    data: Path, name: str, count: int, batch_size: int, dtype: torch.dtype
) -> tuple[dict[str, tuple[Curves, Curves]], int]:
    """Return insertion and deletion curves of every ranking on a set's second half, and the number of images."""
    _, classes, resize = accuracy.SETS[name]
    _, second = accuracy.halves(data / name / "val")
    files = accuracy.thinned(second, count)
    guides = [g for g in GUIDANCE if (data / "heads" / f"{g}.{name}.safetensors").is_file()]
    models = {g: tdk.Guidance(accuracy.load(data, g, name, classes)).to(dtype) for g in guides}
    model = accuracy.load(data, accuracy.TARGET, name, classes, img_size=224)
    tinydrop = tdk.patch(model, accuracy.load(data, guides[0], name, classes)).to(dtype).tinydrop
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list] = {}
    for images, labels in tqdm(accuracy.batches(files, resize, batch_size), desc=name, total=-(-count // batch_size)):
        images = images.to(dtype)
        maps = {}
        for guide, guidance in models.items():
            tinydrop.guidance = guidance
            for told, saliency in SALIENCY.items():
                maps[f"{guide}, {told}"] = maps_of(tinydrop, images, saliency)
        shape = next(iter(maps.values())).shape
        maps["the center"] = closeness(shape[1], shape[2], images.device).expand(shape)
        maps["random"] = torch.rand(shape, generator=generator)
        dense = seen(tinydrop, images, maps["random"], 1.0)
        first = dense.argmax(1)
        for ranking, scores in maps.items():
            for sign in (1, -1):  # -1 keeps the least salient patches, which is deletion
                answers = [dense if keep == 1 else seen(tinydrop, images, sign * scores, keep) for keep in KEEPS]
                probability = torch.stack([p.gather(1, first[:, None])[:, 0] for p in answers], 1)
                right = torch.stack([p.argmax(1) == labels for p in answers], 1).float()
                found.setdefault(ranking, []).append((sign, probability, right))
    curves = {}
    for ranking, rows in found.items():
        insertion, deletion = (
            Curves(*(np.concatenate([row[i].numpy() for row in rows if row[0] == sign]) for i in (1, 2)))
            for sign in (1, -1)
        )
        curves[ranking] = insertion, deletion
    return curves, len(files)


def interval(values: np.ndarray) -> str:
    """Return the mean and half of its 95 % interval, in percent."""
    return f"{100 * values.mean():.1f} ± {196 * values.std() / len(values) ** 0.5:.1f}"


def table(curves: dict[str, tuple[Curves, Curves]]) -> list[str]:
    rows = [
        "| ranking | insertion | deletion | insertion over the center | insertion: accuracy | deletion: accuracy |",
        "|---|---|---|---|---|---|",
    ]
    center, _ = curves["the center"]
    for ranking, (insertion, deletion) in curves.items():
        areas = [interval(curve.area(curve.probability)) for curve in (insertion, deletion)]
        gained = insertion.area(insertion.probability) - center.area(center.probability)
        areas.append("" if ranking == "the center" else interval(gained))
        areas += [f"{100 * curve.area(curve.right).mean():.1f}" for curve in (insertion, deletion)]
        rows.append(f"| {ranking} | {' | '.join(areas)} |")
    return rows


def points(curves: dict[str, tuple[Curves, Curves]]) -> list[str]:
    """Return a table of the accuracy at each fraction kept, of the most salient patches and in brackets the least."""
    shown = [keep for keep in KEEPS if keep < 1][::-1]
    rows = [
        "| accuracy with this much kept | " + " | ".join(f"{keep:.2g}" for keep in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for ranking, (insertion, deletion) in curves.items():
        cells = []
        for keep in shown:
            place = KEEPS.index(keep)
            cells.append(f"{100 * insertion.right[:, place].mean():.0f} ({100 * deletion.right[:, place].mean():.0f})")
        rows.append(f"| {ranking} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with backbones, heads and the three sets")
    parser.add_argument("--images", type=int, default=200, help="images from each set's second half")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="dtype of all models")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(1, f"no real weights and photographs in {args.data}: nothing measured (docs/accuracy.md)\n")

    text = [
        f"Target {accuracy.TARGET} at 224 px (256 patches), {args.dtype}; torch {torch.__version__}, timm "
        f"{timm.__version__}. Areas in percent, ± half of a 95 % interval. Insertion, deletion and the gain over the "
        f"center are areas of the probability of dense's top class. Kept: {', '.join(f'{k:.2g}' for k in KEEPS)}.",
        "",
    ]
    for name, (kind, *_) in accuracy.SETS.items():
        curves, images = curves_of(args.data, name, args.images, args.batch_size, getattr(torch, args.dtype))
        insertion, _ = next(iter(curves.values()))
        text += [f"## {name} ({kind}): {images} images, dense right on {insertion.right[:, -1].mean():.1%}", ""]
        text += [*table(curves), "", *points(curves), ""]
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
