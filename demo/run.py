"""The demo, which compares a ViT with the same ViT patched, on the same images.

    python demo/run.py

If the model hub can be reached, the demo runs stock ImageNet models on scikit-image's photographs. Otherwise it runs
the two small models of ``demo/weights`` (trained by ``demo/train.py``) on handwritten digits hidden in photographs that
neither model has seen. In both cases it prints a table, draws the kept patches (``demo/out/kept_patches.png``), writes
a page that shows them for each image (``demo/out/index.html``), and calibrates a policy on other images.
"""

import argparse
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from cluttered_digits import CLASS_NAMES, Cluttered
from contact_sheet import contact_sheet
from PIL import Image
from skimage import data as photographs
from timm.data import create_transform, resolve_model_data_config

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import class_names, load_model
from tinydrop_kernels.engine import steps
from tinydrop_kernels.visualize import as_pictures
from tinydrop_kernels.visualize.gallery import Gallery

HERE = Path(__file__).parent
PICTURE = HERE / "out" / "kept_patches.png"
STOCK_TARGET = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "hubble_deep_field", "brick", "grass")
SHOWN = 64  # number of images on the page
ROUNDS = 5
DROP = 0.02  # accuracy that the calibrated policy may lose
CAM = tdk.Saliency()  # Grad-CAM of one class, as in the paper
# The embedded target was trained at one resolution, and its digits are small. So its policy drops patches, keeps the
# dense grid and takes a second look. It was chosen on training images (``Cluttered("train", 192, seed=7)``).
EMBEDDED_POLICY = tdk.DropPolicy(0.8, 0.0, 0.25, coarsen=0.0, blend=0.2, second_look=(0.2, 0.6), saliency=CAM)
RIVALS = {
    "TinyDrop, defaults": tdk.DropPolicy(),
    "the paper's drop": tdk.DropPolicy(0.8, 2.0, 0.25, coarsen=0.0, blend=0.0, second_look=None, saliency=CAM),
    "exits alone": tdk.DropPolicy.cascade(0.8),
    "resolution alone": tdk.DropPolicy.fixed(0.4, tau=0.8, coarsen=1.0),
}


@dataclass
class Scene:
    """The models and images of a demo. Images are normalised for the target."""

    title: str
    model: Any  # the target, a timm model
    guidance: torch.nn.Module
    images: torch.Tensor
    labels: torch.Tensor | None
    names: list[str]
    policy: tdk.DropPolicy
    others: list  # batches to calibrate with: images, or pairs of images and labels if labels are known


def hub_is_reachable() -> bool:
    try:
        with socket.create_connection(("huggingface.co", 443), timeout=3):
            return True
    except OSError:
        return False


def stock_scene() -> Scene:
    model = load_model(STOCK_TARGET)
    transform = create_transform(**resolve_model_data_config(model))
    pictures = [Image.fromarray(getattr(photographs, name)()).convert("RGB") for name in PHOTOGRAPHS]
    images = torch.stack([transform(picture) for picture in pictures])
    return Scene(
        f"{STOCK_TARGET} guided by {tdk.guidance.DEFAULT_GUIDANCE}, stock weights, on scikit-image's photographs",
        model,
        load_model(tdk.guidance.DEFAULT_GUIDANCE),
        images,
        None,
        class_names(model),
        tdk.DropPolicy(),
        [images],
    )


def cluttered(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels, _ = zip(*(Cluttered("test", length, seed=seed)[i] for i in range(length)), strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(labels)


def embedded_scene(length: int, batch_size: int) -> Scene:
    images, labels = cluttered(length, seed=1)
    others = [part.split(batch_size) for part in cluttered(2 * length, seed=2)]
    return Scene(
        "the embedded ViT (6 blocks, 196 patches) and its guidance model, on handwritten digits in real photographs",
        load_model(str(HERE / "weights" / "target")),
        load_model(str(HERE / "weights" / "guidance")),
        images,
        labels,
        CLASS_NAMES,
        EMBEDDED_POLICY,
        list(zip(*others, strict=True)),
    )


def seconds(call, batches) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    answers = [call(batch) for batch in batches]
    return time.perf_counter() - start, torch.cat(answers)


def draw(scene: Scene, last, logits: torch.Tensor, shown: int = 8) -> None:
    """Save a picture of each image and of its kept patches. Dropped patches are dark, and exits are framed."""
    pictures = as_pictures(scene.model, scene.images[:shown])
    names = [scene.names[label].split(",")[0] for label in logits[:shown].argmax(1).tolist()]
    PICTURE.parent.mkdir(exist_ok=True)
    contact_sheet(pictures, last, names).save(PICTURE)


def leaf_through(scene: Scene, batch_size: int) -> Path:
    """Write the page that shows the kept patches of each image. Return the page's path."""
    images = scene.images[:SHOWN]
    if scene.labels is None:
        names = list(PHOTOGRAPHS)
    else:
        names = [f"{i}: {scene.names[label]}" for i, label in enumerate(scene.labels[:SHOWN].tolist())]
    predictor = tdk.Predictor(scene.model, compare_dense=True)
    gallery = Gallery(PICTURE.parent, predictor)
    for start in range(0, len(images), batch_size):
        batch = slice(start, start + batch_size)
        gallery.add(predictor.classify(images[batch], names[batch]))
    return gallery.write()


def calibrate(scene: Scene, dense: torch.Tensor) -> None:
    """Calibrate a policy that loses at most ``DROP``, print its certificate, and try it on the images of the table."""
    path = PICTURE.parent / "policy.json"
    tdk.unpatch(scene.model)
    policy = tdk.calibrate(scene.model, scene.guidance, scene.others, accuracy_drop=DROP)
    policy.save(path)
    print(f"\nCalibrated to lose at most {100 * DROP:g} points, in {path.relative_to(HERE.parent)}:\n{policy}")
    if policy.certificate.passed and scene.labels is not None:
        named = tdk.patch(scene.model, scene.guidance, path)(scene.images).argmax(1)
        lost = (dense.argmax(1) == scene.labels).float().mean() - (named == scene.labels).float().mean()
        saved = scene.model.tinydrop.report().flops_saved
        print(f"On the {len(named)} images of the table it loses {100 * lost:.1f} points, and saves {saved:.1%} FLOPs")


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="number of images in the embedded demo")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--embedded", action="store_true", help="run the embedded demo in any case")
    args = parser.parse_args()

    stock = not args.embedded and hub_is_reachable()
    if not stock:
        print("The model hub is not used or cannot be reached, so this is the embedded demo.")
    scene = stock_scene() if stock else embedded_scene(args.images, args.batch_size)
    print(f"{scene.title}; {len(scene.images)} images, {torch.get_num_threads()} CPU threads\n")

    batches = scene.images.split(args.batch_size)
    model = tdk.patch(scene.model, scene.guidance, scene.policy)
    ways = {
        "dense": (model.tinydrop.dense, None),
        "TinyDrop": (model, scene.policy),
        **{way: (model, policy) for way, policy in RIVALS.items() if policy != scene.policy},
    }
    spent: dict[str, list[float]] = {way: [] for way in ways}
    answers, reports = {}, {}
    for turn in range(ROUNDS + 1):  # all ways take turns, so that other load slows all of them; the first turn warms up
        for way, (call, policy) in ways.items():
            if policy:
                model.tinydrop.policy = policy
            taken, answers[way] = seconds(call, batches)
            if turn:
                spent[way].append(taken)
    calls = {}
    for way, (_, policy) in ways.items():
        if policy:
            model.tinydrop.policy = policy
            model(scene.images)
            reports[way], calls[way] = model.tinydrop.report(), model.tinydrop.last
    report = reports["TinyDrop"]
    flops = {way: told.flops for way, told in reports.items()} | {"dense": report.dense_flops}

    accuracy = "accuracy" if scene.labels is not None else ""
    print(f"{'':24s}{'images/s':>10s}{'speed-up':>10s}{'GFLOPs':>9s}{'agreement':>11s}{accuracy:>10s}")
    dense = statistics.median(spent["dense"])
    for way in ways:
        taken = statistics.median(spent[way])
        agreement = (answers[way].argmax(1) == answers["dense"].argmax(1)).float().mean()
        line = f"{way:24s}{len(scene.images) / taken:10.1f}{dense / taken:9.2f}x"
        line += f"{flops[way] / len(scene.images) / 1e9:9.2f}{agreement:11.1%}"
        if scene.labels is not None:
            line += f"{(answers[way].argmax(1) == scene.labels).float().mean():10.1%}"
        print(line)
    if scene.labels is not None:
        guided = torch.cat([steps.guide(model.tinydrop, batch).logits for batch in batches])
        right = (guided.argmax(1) == scene.labels).float().mean()
        print(f"\nThe guidance model alone is right on {right:.1%}.")
    print(f"\nTinyDrop with {scene.policy}:\n{report}")
    draw(scene, calls["TinyDrop"], answers["TinyDrop"])
    print(f"\nPicture of the kept patches: {PICTURE.relative_to(HERE.parent)}")
    model.tinydrop.policy = scene.policy
    page = leaf_through(scene, args.batch_size)
    print(f"Page of the kept patches of each image, to open in a browser: {page.relative_to(HERE.parent)}")
    calibrate(scene, answers["dense"])
    print(f"timm {timm.__version__}, torch {torch.__version__}; medians of {ROUNDS} runs in turn, guidance counted")


if __name__ == "__main__":
    main()
