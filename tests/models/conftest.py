"""Small models as fixtures."""

import pytest
import torch
from helpers import tiny_guidance, tiny_vit

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
