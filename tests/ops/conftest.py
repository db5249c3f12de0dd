"""The backends on which the cases run."""

import importlib.util

import pytest
import torch

from tinydrop_kernels.ops import OPERATORS, use_backend

from .cases import GPU, Backend

REFERENCES = [Backend("reference", "cpu")] + ([Backend("reference", "cuda")] if GPU else [])
TRITON = Backend("triton", "cuda" if GPU else "cpu")
# "padded" is what the reference runs where lengths are not to be read back, here on CPU too.
ATTENTION = [*REFERENCES, Backend("padded", "cpu"), TRITON, Backend("cuda", "cuda"), Backend("torch", "cuda")]


def running(backend):
    """Force the backend, or skip and say why this machine has none."""
    if backend.name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if backend.device == "cuda" and not GPU:
        pytest.skip(f"{backend.name} needs a GPU")
    if backend.name == "padded":
        yield backend
        return
    for implementation in OPERATORS["varlen_attention"].implementations:
        if implementation.name == backend.name and (reason := implementation.missing_on(backend.device)):
            pytest.skip(reason)
    with use_backend(backend.name):
        yield backend


@pytest.fixture(params=[*REFERENCES, TRITON], ids=str)
def backend(request):
    yield from running(request.param)


@pytest.fixture(params=ATTENTION, ids=str)
def attention_backend(request):
    yield from running(request.param)


@pytest.fixture
def triton():
    """Where the kernels run, for tests that compare them with the reference."""
    yield from running(TRITON)


@pytest.fixture(autouse=True)
def float32_proper():
    """No TF32: tolerances are of float32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
