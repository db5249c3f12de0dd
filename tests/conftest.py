"""Shared fixtures. Uninitialised memory of the package is filled with NaN, so that rows that are never written show."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # because otherwise tests wait for the model hub

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run on CPU; Triton reads this at its import

NO_BFLOAT16 = ""  # why the interpreter cannot be trusted with bfloat16
if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_bf16

    try:
        interpreter_bf16.mend()
    except RuntimeError as unknown:  # another Triton must not take down the tests that do without bfloat16
        NO_BFLOAT16 = str(unknown)

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
    """Fill what the package gets from ``torch.empty`` with NaN, as flash-linear-attention's tests do."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Forget that earlier tests have trained, because otherwise nothing computed from weights is cached."""
    if importlib.util.find_spec("timm") is not None:
        monkeypatch.setattr("tinydrop_kernels.ops.derived._training", 0)


@pytest.fixture(autouse=True)
def interpreter_knows_bfloat16(request):
    if NO_BFLOAT16 and "triton" in request.node.name and "bfloat16" in request.node.name:
        pytest.skip(NO_BFLOAT16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data():
    """Return the folder of real weights and photographs. The test is skipped if there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no real weights and photographs in {DATA} (set TINYDROP_DATA)")
    return DATA


@pytest.fixture
def vit():
    """Return a small ViT."""
    from helpers import tiny_vit

    return tiny_vit()


@pytest.fixture
def patched(vit):
    """Return a patched tiny ViT that keeps half of the patches and has no exits."""
    from helpers import tiny_guidance

    import tinydrop_kernels as tdk

    return tdk.patch(vit, tiny_guidance(), tdk.DropPolicy.fixed(0.5))


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


@pytest.fixture(autouse=True)
def rounding_where_a_gpu_would():
    """Round convolutions to TF32 if TINYDROP_TF32 is set, to test that tolerances are wide enough for a GPU."""
    if "TINYDROP_TF32" not in os.environ:
        yield
        return
    from tensor_float32 import RoundingProducts

    with RoundingProducts():
        yield
