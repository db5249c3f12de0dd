"""Whole patched models answer the same on the Triton kernels, compiled or interpreted, as on the reference."""

import collections
import sys

import pytest
import torch
from counting import DEVICE, READS, SizesFromValues, assert_same_on_the_kernels
from helpers import tiny_guidance, tiny_vit, varied_images
from slow import mostly_slow
from zoo import make

import tinydrop_kernels as tdk
from tinydrop_kernels import ops


@pytest.mark.parametrize(
    "key",
    mostly_slow(
        [
            "augreg",
            "gap and registers",
            "siglip map",
            "deit distilled",
            "aimv2",
            "max",
            "not square",
            "beit, both biases",
            "eva02",
            "dinov3",
            "rope, mixed",
            "pe core",
        ],
        "augreg",
        "deit distilled",
        "beit, both biases",
        "eva02",
        "max",
    ),
)
def test_same_answers_as_the_reference(key):
    model, images = make(key)
    assert_same_on_the_kernels(model.to(DEVICE), images.to(DEVICE))


@pytest.mark.parametrize(
    "options",
    [{}, {"global_pool": "avg", "reg_tokens": 2}, {"global_pool": "map"}],
    ids=["token", "avg", "map with class token"],
)
@pytest.mark.parametrize(
    "second_look", [None, pytest.param((1.0, 1.0), marks=pytest.mark.slow)], ids=["once", "second look"]
)
def test_one_read_from_the_device_per_batch(monkeypatch, options, second_look):
    """A batch on the kernels reads back once, in ``pack``, and once more if the policy has a second look.

    Only reads by the package and by timm are counted, not those by Triton's interpreter.
    """
    policy = tdk.DropPolicy(0.6, 1.0, 0.1, 0.5, second_look=second_look)
    vit = tdk.patch(tiny_vit(**options).to(DEVICE), tiny_guidance(sharpness=4.0), policy)
    batches = [varied_images(4).to(DEVICE) for _ in range(2)]
    reads: collections.Counter = collections.Counter()

    def counting(name, method):
        def read(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            function = sys._getframe(1).f_code.co_name
            if caller.startswith(("tinydrop_kernels", "timm")):
                reads[f"{caller}.{function}: {name}"] += 1
            return method(*args, **kwargs)

        return read

    with torch.inference_mode(), ops.use_backend("triton"):
        vit(batches[0])
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        with SizesFromValues() as sizes:
            vit(batches[1])
        assert not vit.tinydrop.last.exited.all()
        assert vit.tinydrop.last.second_look.any() == (second_look is not None)
    assert sizes.found == ([] if second_look is None else ["aten.nonzero.default"])
    once_more = {} if second_look is None else {"tinydrop_kernels.engine.steps._look_again: nonzero": 1}
    assert reads == {"tinydrop_kernels.ops.packing.read: tolist": 1} | once_more
