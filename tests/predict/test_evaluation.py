"""``evaluate`` counts what timm's own answers say, and states how sure the difference is."""

import copy
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import CLASSES, FakePatched
from helpers import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk


@pytest.fixture
def fake():
    """Return a fake model. Dense it answers class 0, patched the brightness, guidance class 1 except for exits."""
    model = FakePatched()
    model.tinydrop.guidance = tdk.Guidance(tiny_guidance(CLASSES))
    return model


def batch_of(levels, labels):
    """Return images of these levels of brightness, which are the patched answers, and their labels."""
    images = torch.tensor(levels).float().add(0.5).div(CLASSES)
    return images[:, None, None, None].expand(-1, 3, 8, 8), torch.tensor(labels)


# columns: brightness = patched answer, label; dense always answers 0, guidance 1, and 3 for the brightest
BATCHES = [batch_of([0, 1, 2, 3, 1], [0, 1, 0, 3, 2]), batch_of([2, 0, 1], [2, 1, 0])]


def test_counts_by_hand(fake):
    found = tdk.evaluate(fake, iter(BATCHES))
    assert found.images == 8 and found.report.calls == 2
    assert (found.dense.top1, found.patched.top1, found.guidance.top1) == (3 / 8, 4 / 8, 3 / 8)
    assert (found.only_dense, found.only_patched) == (2, 3)
    assert (found.dense.agreement, found.patched.agreement, found.guidance.agreement) == (1, 2 / 8, 0)
    assert (found.dense.exits, found.patched.exits, found.guidance.exits) == (0, 1 / 8, 1)
    assert (found.dense.flops_saved, found.patched.flops_saved, found.guidance.flops_saved) == (0, 0.5, 0.9)
    assert found.guidance.top5 == 1  # there are four classes


def test_top_five_of_timms_own_answers():
    """The label is among the top five if fewer than five classes have a higher logit, from timm itself."""
    vit, guidance = tiny_vit(num_classes=12), tiny_guidance(12)
    patched = tdk.patch(copy.deepcopy(vit), guidance, tdk.DropPolicy.fixed(0.3))
    images, labels = varied_images(40), torch.randint(12, (40,))
    found = tdk.evaluate(patched, [(images[:30], labels[:30].numpy()), (images[30:], labels[30:].tolist())])
    with torch.inference_mode():
        answers = {"dense": vit(images), "patched": patched(images)}
    for name, logits in answers.items():
        higher = (logits > logits.gather(1, labels[:, None])).sum(1)
        score = getattr(found, name)
        assert score.top1 == (higher == 0).float().mean().item() != score.top5
        assert score.top5 == pytest.approx((higher < 5).float().mean().item())
    same = answers["dense"].argmax(1) == answers["patched"].argmax(1)
    assert found.patched.agreement == pytest.approx(same.float().mean().item()) and 0 < same.sum() < 40
    assert found.dense.param_count == sum(parameter.numel() for parameter in vit.parameters())
    assert found.patched.param_count == found.dense.param_count + found.guidance.param_count
    assert (found.dense.img_size, found.guidance.img_size) == (32, patched.tinydrop.guidance.input_size[1])


def test_models_take_turns_and_the_warm_up_does_not_count(fake, monkeypatch):
    """On a fake clock, a patched call takes 1 s and a dense call 4 s, and ten times as long during the warm-up."""
    clock, calls = [0.0], []

    def call(name, seconds):
        clock[0] += seconds * (10 if len(calls) < 2 else 1)
        calls.append(name)

    forward, dense = fake.forward, fake.dense
    monkeypatch.setattr(fake, "forward", lambda images: call("patched", 1.0) or forward(images))
    monkeypatch.setattr(fake.tinydrop, "dense", lambda images: call("dense", 4.0) or dense(images))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    found = tdk.evaluate(fake, BATCHES)
    assert calls == ["patched", "dense"] * 3
    assert (found.patched.images_per_second, found.dense.images_per_second) == (4.0, 1.0)
    assert found.guidance.images_per_second is None
    assert found.verdict.startswith(
        "Patched is 4.00 times as fast as dense and 12.5 points more accurate (95 % interval"
    )
    assert found.verdict.endswith("on these 8 images.")


def test_interval_is_that_of_the_mean_difference(fake):
    """The oracle is NumPy's mean and deviation of the differences, with one more of each sign."""
    found = replace(tdk.evaluate(fake, BATCHES), images=1000, only_dense=31, only_patched=12)
    differences = np.array([-1] * 32 + [1] * 13 + [0] * 957)
    half = 1.96 * differences.std() / len(differences) ** 0.5
    assert found.interval == pytest.approx((differences.mean() - half, differences.mean() + half))
    low, high = replace(found, only_dense=0, only_patched=0).interval
    assert low < 0 < high and low == -high
    assert replace(found, images=1, only_dense=1, only_patched=0).interval[0] == -1


def test_verdict_in_words(fake):
    found = replace(tdk.evaluate(fake, BATCHES), images=986, only_dense=10, only_patched=6)
    report = replace(found.report, wall_seconds=1.0, dense_seconds=2.314)

    def verdict(patched):
        scores = {"dense": replace(found.dense, top1=0.99), "patched": replace(found.patched, top1=patched)}
        return replace(found, report=report, **scores).verdict

    assert verdict(0.986) == (
        "Patched is 2.31 times as fast as dense and 0.4 points less accurate (95 % interval -0.4 to 1.2) "
        "on these 986 images."
    )
    assert "0.5 points more accurate (95 % interval -1.2 to 0.4)" in verdict(0.995)
    assert "as accurate (95 % interval of the difference -1.2 to 0.4 points)" in verdict(0.9897)


def test_columns_are_those_of_timms_results(fake):
    columns = tdk.evaluate(fake, BATCHES).as_dict()
    timms = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]
    assert list(columns) == [*timms, "images_per_second", "flops_saved", "exits", "agreement"]
    assert columns["model"] == ["FakePatched", "FakePatched + test_byobnet.r160_in1k", "test_byobnet.r160_in1k"]
    assert columns["top1"] == [37.5, 50, 37.5] and columns["top1_err"] == [62.5, 50, 62.5]
    assert columns["flops_saved"] == [0, 50, 90] and columns["exits"] == [0, 12.5, 100]
    assert columns["param_count"][2] == pytest.approx(0.2, abs=0.1)  # in millions
    assert columns["crop_pct"] == [1.0] * 3 and columns["interpolation"] == ["bicubic"] * 3


def test_printed_as_a_table(fake):
    lines = str(tdk.evaluate(fake, BATCHES)).splitlines()
    assert lines[0].split() == ["top-1", "top-5", "images/s", "FLOPs", "saved", "exits", "agreement"]
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "patched", "guidance"]
    assert lines[2].split()[1] == "50.0%" and lines[2].endswith("50.0%    12.5%      25.0%")
    assert lines[3].split()[4] == "-" and len({len(line) for line in lines[:4]}) == 1
    assert lines[4].startswith("Patched is ")


def test_guidance_of_other_classes_has_no_score():
    model = tdk.patch(tiny_vit(), tiny_guidance(7), tdk.DropPolicy.fixed(0.5))
    found = tdk.evaluate(model, [(varied_images(3), torch.tensor([0, 1, 2]))])
    assert found.guidance is None and len(found.as_dict()["top1"]) == 2
    assert "guidance alone" not in str(found)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(2, 3, 32, 32), TypeError, "loader: got images without labels, expected \\(images, labels\\)"),
        ((torch.zeros(2, 3, 32, 32).byte(), torch.tensor([0, 1])), TypeError, "loader: got images in torch.uint8"),
        ((torch.zeros(2, 3, 32, 32),), TypeError, "loader: got a batch of tuple"),
        ((torch.zeros(2, 3, 32, 32), torch.tensor([0])), ValueError, "loader: got labels int64 \\(1,\\)"),
        ((torch.zeros(2, 3, 32, 32), torch.tensor([0.0, 1.0])), ValueError, "expected whole numbers \\(2,\\)"),
        ((torch.zeros(2, 3, 32, 32), torch.tensor([0, 5])), ValueError, "loader: got labels 0 to 5, expected 0 to 4"),
        ((torch.zeros(2, 3, 32, 32), torch.tensor([-1, 4])), ValueError, "loader: got labels -1 to 4"),
        ((torch.zeros(0, 3, 32, 32), torch.zeros(0).long()), ValueError, "loader: got a batch without images"),
        ((torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])), ValueError, "images: got 1 channels, expected 3"),
    ],
)
def test_batches_are_checked(patched, batch, error, message):
    with pytest.raises(error, match=message):
        tdk.evaluate(patched, [batch])


def test_models_are_checked(patched, vit):
    batch = (varied_images(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="loader: got no images"):
        tdk.evaluate(patched, [])
    with pytest.raises(RuntimeError, match="training mode"):
        tdk.evaluate(patched.train(), [batch])
    with pytest.raises(ValueError, match="not patched"):
        tdk.evaluate(tiny_vit(), [batch])
    many = tdk.patch(tiny_vit(), tiny_guidance(), multi_label=True)
    with pytest.raises(ValueError, match="multi-label"):
        tdk.evaluate(many, [batch])
    none = tdk.patch(tiny_vit(num_classes=0), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    with pytest.raises(ValueError, match="without classes"):
        tdk.evaluate(none, [batch])


def test_half_precision_images_are_converted(patched):
    found = tdk.evaluate(patched.bfloat16(), [(varied_images(2), torch.tensor([0, 1]))])
    assert found.images == 2
