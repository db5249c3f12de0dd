"""Tests of loading: batches are joined where they are loaded."""

import os

import numpy as np
import pytest
import torch
from fakes import FakePatched

from tinydrop_kernels.predict.loading import ImageLoader


@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_joined_by_the_process_that_loads_them(monkeypatch, workers):
    """Only then does the loader pin the memory of the whole batch, and the main process copies nothing."""
    main, stack = os.getpid(), torch.stack

    def elsewhere(*tensors):
        assert not workers or os.getpid() != main
        return stack(*tensors)

    monkeypatch.setattr(torch, "stack", elsewhere)
    unreadable = []
    loader = ImageLoader(FakePatched(), 3, workers, lambda name, reason: unreadable.append(name))
    inputs = [np.zeros((8, 8, 3), np.uint8), b"no image", np.full((8, 8, 3), 255, np.uint8), b"no image"]
    (batch,) = loader(inputs)
    assert batch.images.shape == (2, 3, 8, 8) and batch.images[1].min() == 1 and batch.images[0].max() == 0
    assert (batch.indices, batch.names, unreadable) == ([0, 2], ["#0", "#2"], ["#1", "#3"])
