"""Shared fixtures. Memory that the package takes uninitialised is poisoned, so that a row it forgets to write shows."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a model hub
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported: kernels run on CPU tensors

import pytest
import timm
import torch

import tinydrop_kernels as tdk

if importlib.util.find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "1":
    import interpreter_bf16

    interpreter_bf16.mend()

DATA = Path(os.environ.get("TINYDROP_DATA", Path(__file__).parents[2] / "shared" / "data"))


def _poisoned(create):
    def empty(*args, **kwargs):
        tensor = create(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("tinydrop_kernels"):
            with torch.no_grad():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)
        return tensor

    return empty


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """As flash-linear-attention does: what ``torch.empty`` hands to the package is NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data():
    """The folder of real weights and photographs; skips where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no real weights and photographs in {DATA} (set TINYDROP_DATA)")
    return DATA


def tiny_vit(**options) -> torch.nn.Module:
    """A ViT of timm's own class, small enough for every test: 4 x 4 patches of 8 pixels, 2 blocks, 5 classes."""
    options = {"num_classes": 5, "img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2} | options
    return with_random_weights(timm.create_model("vit_tiny_patch16_224", **options))


def tiny_guidance(num_classes: int = 5, in_chans: int = 3, sharpness: float = 12.0) -> torch.nn.Module:
    """timm's smallest convolutional classifier with a head that is linear after average pooling.

    ``sharpness`` spreads its confidences: random weights alone are about equally unsure of everything.
    """
    model = with_random_weights(timm.create_model("test_byobnet", num_classes=num_classes, in_chans=in_chans))
    model.head.fc.weight.data.mul_(sharpness)
    return model


def with_random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Eval mode, and every parameter and running statistic that timm starts at zero or one made to matter."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim <= 1 or "token" in name or "pos_embed" in name or "latent" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.mul_(0.5 + torch.rand_like(tensor))
    return model.eval()


@pytest.fixture
def vit():
    return tiny_vit()


@pytest.fixture
def patched(vit):
    """A patched tiny ViT that exits nothing and keeps half of the patches."""
    return tdk.patch(vit, tiny_guidance(), tdk.DropPolicy.fixed(0.5))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


def varied_images(batch: int, size: int = 32) -> torch.Tensor:
    """Images that differ enough, in colour and coarse shape, for a random guidance model to tell them apart."""
    coarse = torch.nn.functional.interpolate(torch.randn(batch, 3, 4, 4), size=size, mode="nearest")
    return 2 * coarse + 2 * torch.randn(batch, 3, 1, 1) + 0.1 * torch.randn(batch, 3, size, size)
