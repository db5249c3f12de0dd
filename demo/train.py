"""Training of the demo's two small models from random weights, which are saved under ``demo/weights``.

    python demo/train.py            # about half an hour on two CPU cores

The target is a stock timm ``VisionTransformer`` with 196 patch tokens. The guidance model is a stock timm ``ByobNet``.
Neither is trained for token dropping, so the target always sees every token. The target learns the class of the image,
and through a second head also the class of each patch (token labelling, Jiang et al. 2021, arXiv 2104.10858). With the
second head, training reaches the same accuracy with a fifth of the images. The second head is not saved.

Weights are saved in float16, in the folder layout that ``timm.create_model("local-dir:...")`` reads.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cluttered_digits import CLASS_NAMES, Cluttered
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import nn
from torch.utils.data import DataLoader

WEIGHTS = Path(__file__).parent / "weights"
MEAN = STD = (0.5, 0.5, 0.5)
BATCH = 64
NOTHING = len(CLASS_NAMES)  # the class of a patch that does not touch the digit


def normalised(images: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Turn uint8 ``(batch, height, width, 3)`` into float32 ``(batch, 3, size, size)`` in [-1, 1]."""
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images if size is None else F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def patch_labels(labels: torch.Tensor, boxes: torch.Tensor, grid: int, patch: int) -> torch.Tensor:
    """Return the class of each patch, ``(batch, grid * grid)``: the digit in its box, ``NOTHING`` elsewhere."""
    centers = (torch.arange(grid) + 0.5) * patch
    inside_rows = (centers > boxes[:, 0:1]) & (centers < boxes[:, 2:3])
    inside_columns = (centers > boxes[:, 1:2]) & (centers < boxes[:, 3:4])
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    return torch.where(inside, labels[:, None, None], NOTHING).flatten(1)


@torch.no_grad()
def start_local(model: Any) -> None:
    """Initialise a ViT so that tokens attend to their neighbourhood, which takes long to learn from few images.

    Positions start as sines and cosines, and queries and keys as nearly the same projection. So a token attends to
    tokens with a similar position (mimetic initialisation, Trockman and Kolter 2023, arXiv 2305.09828).
    """
    rows, columns = model.patch_embed.grid_size
    dim = model.embed_dim
    frequency = 1.0 / 100 ** (torch.arange(dim // 4) / (dim // 4))
    y, x = (
        t.flatten()[:, None] * frequency for t in torch.meshgrid(*map(torch.arange, (rows, columns)), indexing="ij")
    )
    model.pos_embed[0, model.num_prefix_tokens :] = 0.5 * torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)
    for block in model.blocks:
        attention = block.attn
        heads = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, dim)
        for head in range(attention.num_heads):
            noise = torch.randn(dim, dim) / dim**0.5
            u, s, vh = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(dim))
            root = s[: attention.head_dim].sqrt()[:, None]
            heads[0, head] = u[:, : attention.head_dim].T * root
            heads[1, head] = vh[: attention.head_dim] * root
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim))
        heads[2] = (vh * s.sqrt()[:, None]).view_as(heads[2])
        attention.proj.weight.copy_(u * s.sqrt())


class Vit(nn.Module):
    """The target, with a classifier of single patches that is used for training only."""

    def __init__(self):
        super().__init__()
        self.model = timm.create_model(
            "vit_tiny_patch16_224", num_classes=len(CLASS_NAMES), embed_dim=192, depth=6, num_heads=3
        )
        start_local(self.model)
        self.patch_head = nn.Linear(192, NOTHING + 1)

    def loss(self, images, labels, boxes):
        tokens = self.model.forward_features(normalised(images))
        logits = self.model.forward_head(tokens)
        patches = self.patch_head(tokens[:, self.model.num_prefix_tokens :]).flatten(0, 1)
        wanted = patch_labels(labels, boxes, grid=14, patch=16).flatten()
        return F.cross_entropy(logits, labels) + F.cross_entropy(patches, wanted), logits


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("test_byobnet", num_classes=len(CLASS_NAMES))

    def loss(self, images, labels, boxes):
        logits = self.model(normalised(images, size=160))
        return F.cross_entropy(logits, labels), logits


def train(trainee: Any, steps: int, peak_lr: float) -> nn.Module:
    """Train with AdamW, warm-up and cosine decay, in bfloat16 autocast. Return the timm model in eval mode."""
    decayed = [p for p in trainee.parameters() if p.ndim > 1]
    others = [p for p in trainee.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    loader = DataLoader(
        Cluttered("train", steps * BATCH, easy=steps * BATCH // 2), batch_size=BATCH, num_workers=1, prefetch_factor=4
    )
    trainee.train()
    start = time.time()
    for step, (images, labels, boxes) in enumerate(loader):
        warm = min(1.0, (step + 1) / 200)
        lr = peak_lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss, logits = trainee.loss(images, labels, boxes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            right = (logits.argmax(1) == labels).float().mean()
            print(f"{step:5d}/{steps} loss {loss:.3f} accuracy {right:.2f} {time.time() - start:.0f} s", flush=True)
    return trainee.model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, size: int | None, images: int = 1000) -> float:
    right = 0
    for batch, labels, _ in DataLoader(Cluttered("test", images), batch_size=50):
        right += (model(normalised(batch, size)).argmax(1) == labels).sum().item()
    return right / images


def save(model: nn.Module, folder: Path, input_size: int) -> None:
    data_config = {"mean": MEAN, "std": STD, "input_size": (3, input_size, input_size), "crop_pct": 1.0}
    config = {"label_names": CLASS_NAMES}
    save_for_hf(model, folder, model_config=config, data_config=data_config, safe_serialization=True)
    weights = folder / "model.safetensors"
    save_file({name: t.half() if t.is_floating_point() else t for name, t in load_file(weights).items()}, weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance-steps", type=int, default=600)
    parser.add_argument("--target-steps", type=int, default=1300)
    parser.add_argument("--only", choices=("guidance", "target"))
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.only != "target":
        guidance = train(Cnn(), args.guidance_steps, peak_lr=3e-3)
        save(guidance, WEIGHTS / "guidance", input_size=160)
        print(f"guidance: {accuracy(guidance, 160):.3f} on unseen handwriting and photographs")
    if args.only != "guidance":
        target = train(Vit(), args.target_steps, peak_lr=5e-4)
        save(target, WEIGHTS / "target", input_size=224)
        print(f"target: {accuracy(target, None):.3f} on unseen handwriting and photographs")


if __name__ == "__main__":
    main()
