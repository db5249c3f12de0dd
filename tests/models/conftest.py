"""Small models as fixtures."""

import os

import pytest
import torch
from helpers import tiny_guidance, tiny_vit
from tensor_float32 import RoundingProducts

import tinydrop_kernels as tdk


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


@pytest.fixture(autouse=True)
def rounding_where_a_gpu_would():
    """With TINYDROP_TF32 in the environment, for a test that a GPU's float32 is good enough for others."""
    if "TINYDROP_TF32" not in os.environ:
        yield
        return
    with RoundingProducts():
        yield
