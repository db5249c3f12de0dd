"""``benchmark`` times the dense and the patched model in turn on the same images, and changes nothing else."""

import time

import pytest
import torch
from fakes import FakePatched
from helpers import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk
from tinydrop_kernels import benchmarking


@pytest.fixture
def model():
    return tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy.fixed(0.5))


def test_both_are_measured(model):
    report = tdk.benchmark(model, varied_images(6), rounds=2)
    assert report.images == 6 and report.calls == 1 and report.wall_seconds > 0 and report.dense_seconds > 0
    assert {"guidance", "select", "pack", "blocks"} <= report.seconds.keys()
    assert "speed-up" in str(report) and not model.tinydrop.timed


def test_they_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    """On a fake clock, a patched call takes 4 s and a dense call 1 s. In the first turn both take ten times as long."""
    model, clock, calls = FakePatched(), [0.0], []

    def call(name, seconds):
        clock[0] += seconds * (10 if len(calls) < 2 else 1)
        calls.append(name)

    forward, dense = model.forward, model.dense
    monkeypatch.setattr(model, "forward", lambda images: call("patched", 4.0) or forward(images))
    monkeypatch.setattr(model.tinydrop, "dense", lambda images: call("dense", 1.0) or dense(images))
    model.tinydrop.timed = False
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    report = benchmarking.benchmark(model, torch.zeros(2, 3, 8, 8), rounds=3)
    assert calls == ["patched", "dense"] * 4 + ["patched"]
    assert (report.wall_seconds, report.dense_seconds) == (4.0, 1.0)
    assert report.notes[0].startswith("the patched model is slower than dense here, in batches of 2: 0.5 against 2.0")


def test_what_cannot_be_compared_is_refused(model):
    images = varied_images(2)
    with pytest.raises(ValueError, match="model: this VisionTransformer is not patched"):
        tdk.benchmark(tiny_vit(), images)
    with pytest.raises(ValueError, match="images: got none"):
        tdk.benchmark(model, images[:0])
    with pytest.raises(ValueError, match="rounds: got 0, expected a number >= 1"):
        tdk.benchmark(model, images, rounds=0)
    with pytest.raises(RuntimeError, match="training mode"):
        tdk.benchmark(model.train(), images)
