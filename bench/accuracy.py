"""Accuracy and wall clock on real photographs with real weights, end to end through ``patch``.

    python bench/accuracy.py --data FOLDER [--images N] [--out FILE]

Three sets (docs/accuracy.md): an easy one, a middle one and a hard one. Each batch goes through every policy in turn,
so that all see the same images and the same machine. Judged on the second half of each class. The defaults were chosen
from these policies by this very table.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tqdm import tqdm

import tinydrop_kernels as tdk

SETS = {"imagenette": ("easy", 10, 224), "caltech100": ("middle", 100, 256), "cars66": ("hard", 66, 256)}
TARGET, GUIDANCE = "vit_small_patch14_dinov2", "mobilenetv2_100"
POLICIES = {
    "TinyDrop, tau 0.9, gamma 4, keep >= 50%": tdk.DropPolicy(tau=0.9, gamma=4.0, min_keep=0.5),
    "TinyDrop, tau 0.8, gamma 2, keep >= 25%": tdk.DropPolicy(tau=0.8, gamma=2.0, min_keep=0.25),
    "exits alone, tau 0.8": tdk.DropPolicy.cascade(0.8),
    "exits alone, tau 0.9": tdk.DropPolicy.cascade(0.9),
    **{
        f"drops alone, keep {keep:.0%}{', summary' if summary else ''}": tdk.DropPolicy.fixed(keep, summary=summary)
        for keep in (0.75, 0.5, 0.25)
        for summary in (False, True)
    },
}


def load(data: Path, name: str, images: str, classes: int, **options) -> torch.nn.Module:
    """A backbone with the head that was fitted to one set of images."""
    model = timm.create_model(name, num_classes=classes, **options)
    weights = load_file(data / "backbones" / f"{name}.safetensors")
    weights |= load_file(data / "heads" / f"{name}.{images}.safetensors")
    model.load_state_dict({k: w.float() if w.is_floating_point() else w for k, w in weights.items()})
    return model.eval()


def second_halves(folder: Path, count: int | None) -> list[tuple[Path, int]]:
    """(file, class) of the second half of each class by name, thinned evenly to ``count``."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    files = []
    for label, path in enumerate(classes):
        names = sorted(path.iterdir())
        files += [(name, label) for name in names[len(names) // 2 :]]
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


@torch.inference_mode()
def judge(data: Path, name: str, count: int | None, batch_size: int) -> list[str]:
    """The rows of one set's table, in Markdown."""
    kind, classes, resize = SETS[name]
    model = load(data, TARGET, name, classes, img_size=224)
    guidance = load(data, GUIDANCE, name, classes)
    tdk.patch(model, guidance)
    files = second_halves(data / name / "val", count)
    right, seconds, flops, kept, stayed, exits = (defaultdict(float) for _ in range(6))

    def run(way, call, images, labels, timed=True):
        start = time.perf_counter()
        logits = call(images)
        if timed:
            seconds[way] += time.perf_counter() - start
            right[way] += (logits.argmax(1) == labels).sum().item()

    def dense(images):
        return model.forward_head(model.forward_features(images))

    for turn, (images, labels) in enumerate(tqdm(batches(files, resize, batch_size), desc=name, leave=False)):
        if turn == 0:
            for call in (guidance, dense, model):
                run("warm-up", call, images, labels, timed=False)
        run("guidance alone", guidance, images, labels)
        run("dense", dense, images, labels)
        for way, policy in POLICIES.items():
            model.tinydrop.policy = policy
            run(way, model, images, labels)
            report, last = model.tinydrop.report(), model.tinydrop.last
            flops[way] += report.flops
            flops["dense"] += report.dense_flops / len(POLICIES)
            exits[way] += report.exits
            kept[way] += last.counts.sum().item() / last.num_patches
            stayed[way] += report.images - report.exits

    rows = [
        f"### {name} ({kind}), {len(files)} images",
        "",
        "| | accuracy | exits | mean keep | FLOPs saved | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for way in ("guidance alone", "dense", *POLICIES):
        row = f"| {way} | {right[way] / len(files):.1%} |"
        if way in POLICIES:
            keep = f"{kept[way] / stayed[way]:.0%}" if stayed[way] else "none stayed"
            row += f" {exits[way] / len(files):.0%} | {keep} | {1 - flops[way] / flops['dense']:.0%} |"
        else:
            row += " | | |"
        rows.append(f"{row} {seconds['dense'] / seconds[way]:.2f} |" if way != "guidance alone" else f"{row} |")
    return [*rows, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with backbones, heads and the three sets")
    parser.add_argument("--images", type=int, help="at most so many of each set (all by default)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.exit(1, f"no real weights and photographs in {args.data}: nothing measured (docs/accuracy.md)\n")
    text = [
        f"Target {TARGET} at 224 px (257 tokens), guidance {GUIDANCE}, batch {args.batch_size}, float32, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, timm {timm.__version__}.",
        "Speed-up over dense in the same run, guidance counted.",
        "",
    ]
    for name in SETS:
        text += judge(args.data, name, args.images, args.batch_size)
    print("\n".join(text))
    if args.out:
        args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
