"""A patched model whose answers are set by hand, for what stands on patched models."""

from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch

CLASSES = 4


@dataclass
class FakeReport:
    images: int
    exits: int
    second_looks: int = 0

    def __add__(self, other):
        return FakeReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def fake_call(kept, grid_sizes, num_patches=16, confidence=0.5, second_look=()):
    """What a call with these kept patches leaves behind; an image without any has exited."""
    return SimpleNamespace(
        exited=torch.tensor([not patches for patches in kept]),
        counts=torch.tensor([len(patches) for patches in kept], dtype=torch.int32),
        confidence=torch.full((len(kept),), confidence),
        kept=[torch.tensor(patches, dtype=torch.int32) for patches in kept],
        grid_sizes=grid_sizes,
        second_look=torch.tensor([i in second_look for i in range(len(kept))]),
        num_patches=num_patches,
        saliency=[torch.arange(rows * columns).view(rows, columns).float() for rows, columns in grid_sizes],
    )


class FakePatched(torch.nn.Module):
    """Sees 8 x 8 pixels, normalised to [0, 1]. The class is the image's brightness in quarters; the brightest exit.

    Dense it says class 0 of everything.
    """

    def __init__(self, in_chans=3, confidence=0.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.in_chans, self.num_classes = in_chans, CLASSES
        self.pretrained_cfg = {
            "input_size": (in_chans, 8, 8),
            "mean": (0.0,) * 3,
            "std": (1.0,) * 3,
            "crop_pct": 1.0,
            "label_names": ["black", "dark", "light", "white"],
        }
        self.confidence = confidence
        self.seen = []
        self.tinydrop = SimpleNamespace(dense=self.dense, report=self.report, last=None)
        self.eval()

    def forward(self, images):
        self.seen.append(images)
        classes = (images.float().mean((1, 2, 3)) * CLASSES).long().clamp(max=CLASSES - 1)
        kept = [[] if label == CLASSES - 1 else [0, 3] for label in classes]
        second_look = [i for i, label in enumerate(classes) if label == 1]
        self.tinydrop.last = fake_call(kept, [(2, 2)] * len(kept), 16, self.confidence, second_look)
        return torch.nn.functional.one_hot(classes, CLASSES).to(images.dtype)

    def dense(self, images):
        return torch.eye(CLASSES)[[0] * len(images)]

    def report(self):
        last = self.tinydrop.last
        return FakeReport(len(last.exited), int(last.exited.sum()), int(last.second_look.sum()))
