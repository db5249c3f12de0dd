"""Fixtures for the backends on which the cases run."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydrop_kernels.ops import OPERATORS, use_backend
from tinydrop_kernels.torch_internals import ieee_float32

from .cases import GPU, Backend

REFERENCES = [Backend("reference", "cpu")] + ([Backend("reference", "cuda")] if GPU else [])
TRITON = Backend("triton", "cuda" if GPU else "cpu")
# "padded" is the reference's variant without read-back, which is tested on CPU too.
ATTENTION = [*REFERENCES, Backend("padded", "cpu"), TRITON]
if GPU:
    ATTENTION += [Backend("cuda", "cuda"), Backend("torch", "cuda")]


def running(backend):
    """Force the backend, or skip the test with the reason why this machine has none."""
    if backend.name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if backend.name == "padded":
        yield backend
        return
    for implementation in OPERATORS["varlen_attention"].implementations:
        if implementation.name == backend.name and (reason := implementation.missing_on(backend.device)):
            pytest.skip(reason)
    # Use the math backend on a GPU, because torch's others split float32 into TF32 and round down beyond our bounds.
    is_reference_there = backend == ("reference", "cuda")
    with use_backend(backend.name), sdpa_kernel(SDPBackend.MATH) if is_reference_there else nullcontext():
        yield backend


@pytest.fixture(params=[*REFERENCES, TRITON], ids=str)
def backend(request):
    yield from running(request.param)


@pytest.fixture(params=ATTENTION, ids=str)
def attention_backend(request):
    yield from running(request.param)


@pytest.fixture
def triton():
    """Force Triton, for tests that compare its kernels with the reference."""
    yield from running(TRITON)


@pytest.fixture(autouse=True)
def exact_products():
    """Disable TF32 and sums in half precision, because the tolerances assume sums in float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    with ieee_float32():
        yield
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = before
