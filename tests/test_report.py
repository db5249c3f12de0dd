"""Reports say in words if patching does not pay, from counts and measured times. They ignore times not measured."""

from dataclasses import replace

import pytest
import torch
from fakes import fake_report
from helpers import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk


def test_a_report_that_pays_has_no_notes():
    report = fake_report(exits=2, wall_seconds=1.0, dense_seconds=2.0)
    assert report.notes == [] and "note" not in str(report)
    assert report.speed_up == 2 and "images/s 8.0, dense 4.0, speed-up 2.00 x" in str(report)


def test_slower_than_dense_is_said():
    report = fake_report(exits=2, calls=4, wall_seconds=2.0, dense_seconds=1.6)
    (note,) = report.notes
    assert note == "the patched model is slower than dense here, in batches of 2: 4.0 against 5.0 images/s"
    assert f"note: {note}" in str(report)
    report = replace(report, seconds={"guidance": 0.5, "select": 0.2, "pack": 0.1, "blocks": 1.2})
    assert report.notes == [f"{note}; 40% of its time goes before the target, to guidance, selection and packing"]


@pytest.mark.parametrize("times", [{}, {"wall_seconds": 9.0}, {"dense_seconds": 1.0}])
def test_time_that_was_not_measured_is_no_verdict(times):
    report = fake_report(exits=2, **times)
    assert report.speed_up is None and report.notes == [] and "speed-up" not in str(report)


def test_a_plain_cascade_that_does_as_well_is_said():
    assert fake_report(exits=2, flops=75).notes == []
    told = (
        "a plain cascade (exits alone, with a dense target) would do as well: 0.08 GFLOPs against 0.08 on these images"
    )
    scale = 10**6
    costs = {"flops": 77 * scale, "cascade_flops": 80 * scale, "guidance_flops": scale, "dense_flops": 100 * scale}
    assert fake_report(exits=2, **costs).notes == [told]


def test_where_nothing_exits_the_rival_is_dense():
    assert fake_report(flops=79, cascade_flops=80).notes == []
    (note,) = fake_report(flops=96, cascade_flops=110).notes
    assert note.startswith("the dense model (no image exited) would do as well")


def test_reports_add_up():
    timed = fake_report(wall_seconds=1.0, dense_seconds=2.0, seconds={"guidance": 0.5})
    both = timed + replace(timed, seconds={"second look": 0.25}, read_backs=2)
    assert (both.images, both.flops, both.cascade_flops, both.calls, both.read_backs) == (16, 100, 160, 2, 3)
    assert (both.wall_seconds, both.dense_seconds) == (2.0, 4.0)
    assert both.seconds == {"guidance": 0.5, "second look": 0.25}
    half = timed + replace(timed, dense_seconds=None)
    assert half.wall_seconds == 2.0 and half.dense_seconds is None


@torch.inference_mode()
def test_the_cascade_is_what_a_cascade_costs():
    """The reported FLOPs of a cascade, computed without running one, are those of a real cascade."""
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy(tau=0.6, min_keep=0.2, coarsen=0.5, second_look=None))
    images = varied_images(16)
    model(images)
    report = model.tinydrop.report()
    assert 0 < report.exits < 16 and report.flops < report.cascade_flops
    model.tinydrop.policy = tdk.DropPolicy.cascade(0.6)
    model(images)
    cascade = model.tinydrop.report()
    assert report.cascade_flops == cascade.flops == cascade.cascade_flops
    assert cascade.notes[-1].startswith("a plain cascade")


@torch.inference_mode()
def test_read_backs_are_counted():
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    images = varied_images(4)
    model(images)
    assert model.tinydrop.report().read_backs == 1
    model.tinydrop.policy = tdk.DropPolicy(tau=None, second_look=(0.2, 0.9))
    model(images)
    assert model.tinydrop.report().read_backs == 2  # reads back even if no answer is doubtful
    model.tinydrop.policy = tdk.DropPolicy(tau=0.01, second_look=(0.2, 0.9))
    model(images)
    assert model.tinydrop.report().exits == 4 and model.tinydrop.report().read_backs == 1
