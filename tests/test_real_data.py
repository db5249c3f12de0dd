"""Accuracy with real weights on real photographs, if the machine has them, is what was measured before."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tinydrop_kernels as tdk

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import accuracy


@pytest.fixture(scope="module")
def middle(data):
    """Return a patched DINOv2-S, 64 photographs of objects in natural scenes, and their classes."""
    model = accuracy.load(data, accuracy.TARGET, "caltech100", 100, img_size=224)
    tdk.patch(model, accuracy.load(data, accuracy.GUIDANCE, "caltech100", 100))
    _, second = accuracy.halves(data / "caltech100" / "val")
    images, labels = next(accuracy.batches(accuracy.thinned(second, 64), 256, 64))
    return model, images, labels


@torch.inference_mode()
def right(model, policy, images, labels) -> int:
    model.tinydrop.policy = policy
    return int((model(images).argmax(1) == labels).sum())


def test_keep_everything_is_dense(middle):
    model, images, _ = middle
    model.tinydrop.policy = tdk.DropPolicy.fixed(1.0)
    with torch.inference_mode():
        dense, out = model.tinydrop.dense(images[:8]), model(images[:8])
    assert (out - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.slow
def test_saliency_is_worth_much(middle):
    """About 61 of 64 images are right dense, 55 with the salient quarter of the patches, and 38 with a random one."""
    model, images, labels = middle
    assert right(model, tdk.DropPolicy.fixed(1.0), images, labels) >= 57
    paper = replace(tdk.DropPolicy.fixed(0.25), saliency=tdk.Saliency())
    assert right(model, paper, images, labels) >= 46


@pytest.mark.slow
def test_coarsening_first_beats_dropping_alone(middle):
    """At 40 % of the patches, about 61 of 64 images are right with coarsening and 58 without, and 61 by default."""
    model, images, labels = middle
    dense = right(model, tdk.DropPolicy.fixed(1.0), images, labels)
    assert right(model, tdk.DropPolicy.fixed(0.4, coarsen=0.67), images, labels) >= dense - 2
    assert right(model, tdk.DropPolicy(), images, labels) >= dense - 2
    assert model.tinydrop.report().flops_saved > 0.5
