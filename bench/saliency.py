"""Insertion and deletion: is what a guidance model finds salient what the target needs?

    python bench/saliency.py --data FOLDER [--images N] [--out FILE]

After RISE (Petsiuk et al. 2018, arXiv 1806.07421, section 4.2), with patches in the place of pixels: nothing is blurred
or greyed, since the target need not see a patch at all. Insertion keeps the most salient fraction of the patches,
deletion keeps what is left when that fraction is gone; both are the area under the curve of what the target then makes
of the image, over the fraction kept or gone. A good ranking has a high insertion and a low deletion score. Beside each
guidance model stand the order of nearness to the center and a random one.
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
KEEPS = (1 / 256, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # the target must see something: a patch is the least


class Curves(NamedTuple):
    """What the target makes of images of which a fraction is kept: ``(images, len(KEEPS))``."""

    probability: np.ndarray  # of the class that dense says
    right: np.ndarray  # 1 where the first class is the label, else 0

    def area(self, values: np.ndarray) -> np.ndarray:
        """Area under each image's curve over the fraction kept, which is that over the fraction gone as well."""
        widths = np.diff(np.array(KEEPS)) / (KEEPS[-1] - KEEPS[0])
        return ((values[:, 1:] + values[:, :-1]) / 2 * widths).sum(1)


def maps_of(tinydrop, images: torch.Tensor, saliency: tdk.Saliency) -> torch.Tensor:
    """What the guidance finds salient, at the target's grid: float32 ``(batch, rows, columns)``."""
    tinydrop.policy = replace(tdk.DropPolicy.fixed(1.0), saliency=saliency)
    plan = steps.plan(tinydrop, images)
    return plan.selection.saliency.view(len(images), *plan.levels[0])


def seen(tinydrop, images: torch.Tensor, maps: torch.Tensor, keep: float) -> torch.Tensor:
    """The target's probabilities ``(batch, classes)`` when it sees the fraction where the maps are highest."""
    tinydrop.policy = tdk.DropPolicy.fixed(keep)
    nothing = images.new_zeros(len(images), tinydrop.guidance.num_classes)  # the guidance's opinion has no say
    return (
        steps.run(tinydrop, images, steps.plan(tinydrop, images, GuidanceOutput(nothing, None, maps)))
        .float()
        .softmax(1)
    )


@torch.inference_mode()
def curves_of(
    data: Path, name: str, count: int, batch_size: int, dtype: torch.dtype
) -> tuple[dict[str, tuple[Curves, Curves]], int]:
    """Insertion and deletion of every ranking on images of a set's judged half, and how many images there were."""
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
            for sign in (1, -1):  # deletion keeps the least salient
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
    """Mean and half of a 95 % interval, in percent."""
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
    """Accuracy at each fraction that is kept: the most salient, and in brackets the least."""
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
    parser.add_argument("--images", type=int, default=200, help="of each set's judged half, evenly thinned")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of all models")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(1, f"no real weights and photographs in {args.data}: nothing measured (docs/accuracy.md)\n")

    text = [
        f"Target {accuracy.TARGET} at 224 px (256 patches), {args.dtype}; torch {torch.__version__}, timm "
        f"{timm.__version__}. Areas in percent, ± half of a 95 % interval; insertion, deletion and the gain over the "
        f"center are of the probability of the class that dense says. Kept: {', '.join(f'{k:.2g}' for k in KEEPS)}.",
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
