"""A fake patched model with answers set by hand, for tests of code that uses patched models."""

from types import SimpleNamespace

import pytest
import torch

from tinydrop_kernels.engine import pipeline, steps
from tinydrop_kernels.policy.drop import DropPolicy
from tinydrop_kernels.report import Report

CLASSES = 4


def fake_report(**figures):
    """Return a report in round numbers: 100 FLOPs dense, 50 patched, 10 for the guidance model."""
    plain = dict.fromkeys(("exits", "second_looks", "coarser", "kept_patches", "patches"), 0)
    plain |= {"images": 8, "flops": 50, "guidance_flops": 10, "cascade_flops": 80, "dense_flops": 100}
    return Report(**(plain | {"read_backs": 1, "calls": 1, "seconds": {}} | figures))


def fake_call(kept, grid_sizes, num_patches=16, confidence=0.5, second_look=()):
    """Return the record of a call with these kept patches. An image without kept patches has exited."""
    return SimpleNamespace(
        exited=torch.tensor([not patches for patches in kept]),
        counts=torch.tensor([len(patches) for patches in kept], dtype=torch.int32),
        confidence=torch.full((len(kept),), confidence),
        kept=[torch.tensor(patches, dtype=torch.int32) for patches in kept],
        grid_sizes=grid_sizes,
        levels=[(round(num_patches**0.5),) * 2],
        guidance_logits=torch.eye(CLASSES)[[1 if patches else CLASSES - 1 for patches in kept]],
        second_look=torch.tensor([i in second_look for i in range(len(kept))]),
        num_patches=num_patches,
        saliency=[torch.arange(rows * columns).view(rows, columns).float() for rows, columns in grid_sizes],
    )


class FakeSteps:
    """The steps of a pipeline: the fake's for a :class:`FakePatched`, the engine's own for a patched model."""

    @staticmethod
    def ask(state, images):
        return images if isinstance(state, SimpleNamespace) else steps.ask(state, images)

    @staticmethod
    def decide(state, pending):
        return pending if isinstance(state, SimpleNamespace) else steps.decide(state, pending)

    @staticmethod
    def start(state, images, plan):
        return (
            SimpleNamespace(images=images) if isinstance(state, SimpleNamespace) else steps.start(state, images, plan)
        )

    @staticmethod
    def finish(state, running):
        return state.model(running.images) if isinstance(state, SimpleNamespace) else steps.finish(state, running)


@pytest.fixture(autouse=True)
def fake_steps(monkeypatch):
    """Let a :class:`FakePatched` go through a pipeline."""
    monkeypatch.setattr(pipeline, "steps", FakeSteps)


class FakePatched(torch.nn.Module):
    """A fake model for images of 8 x 8 pixels in [0, 1]. The class is the brightness in quarters. The brightest exit.

    Dense, the answer is always class 0. The guidance model answers class 1 for images that do not exit.
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
        guidance = SimpleNamespace(model=SimpleNamespace(pretrained_cfg={"architecture": "tiny"}))
        self.tinydrop = SimpleNamespace(
            dense=self.dense,
            num_classes=CLASSES,
            multi_label=False,
            normalization=((0.0,) * in_chans, (1.0,) * in_chans),
            report=self.report,
            last=None,
            policy=DropPolicy(),
            guidance=guidance,
            timed=False,
            graphs=None,
            check=lambda images: None,
            model=self,
        )
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

    def report(self, call=None):
        last = call or self.tinydrop.last
        return fake_report(
            images=len(last.exited),
            exits=int(last.exited.sum()),
            second_looks=int(last.second_look.sum()),
            kept_patches=int(last.counts.sum()),
            patches=16 * int((~last.exited).sum()),
        )
