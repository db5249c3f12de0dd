"""Tests of calibration: policies run as they were judged, and certificates hold."""

import json
import math
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import tiny_guidance, tiny_vit

import tinydrop_kernels as tdk
from tinydrop_kernels.calibration import collection, gather
from tinydrop_kernels.calibration.bounds import least_drop
from tinydrop_kernels.calibration.certify import (
    Candidate,
    Finding,
    certify,
    in_order,
    in_sequence,
    uncertified_best,
)
from tinydrop_kernels.calibration.frontier import draw, frontier, write_csv
from tinydrop_kernels.calibration.sweep import judge, sweep
from tinydrop_kernels.calibration.table import (
    BLENDS,
    PLAIN,
    Reduction,
    Table,
    View,
    drop_reductions,
    law_of,
    whole_reductions,
)
from tinydrop_kernels.policy.drop import CALM

LEVELS = [(8, 8), (7, 7), (6, 6), (5, 5), (4, 4)]


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return tiny_vit(img_size=64), tdk.Guidance(tiny_guidance(), (128, 128))


def batches(count: int = 3, size: int = 16, labelled: bool = True):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(size, 3, 64, 64, generator=generator) for _ in range(count)]
    labels = [torch.randint(0, 5, (size,), generator=generator) for _ in range(count)]
    return list(zip(images, labels, strict=True)) if labelled else images


@pytest.fixture(scope="module")
def answers(models):
    return gather(models[0], [models[1]], batches(), random_drop=True, progress=False)


def made_up(images: int = 400, seed: int = 0, labelled: bool = True) -> Table:
    """Return a table of made-up answers.

    The target is less accurate on coarser grids. The guidance model's accuracy equals its confidence.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, images).astype(np.int32)
    reductions = tuple(whole_reductions(LEVELS))

    def right(chance):
        wrong = (labels + rng.integers(1, 10, images)) % 10
        return np.where(rng.random(images) < chance, labels, wrong).astype(np.int32)

    hard = rng.random(
        images
    )  # shared by all grids, so that an image that is right on one grid is right on all finer grids
    named = [np.where(hard < 0.95 - 0.02 * level**2, labels, (labels + 1) % 10).astype(np.int32) for level in range(5)]
    confidence = rng.random(images).astype(np.float32)
    stacked = np.stack([np.stack([one] * len(BLENDS)) for one in named])
    view = View(
        0, (128, 128), right(confidence), confidence, reductions, stacked, np.full(stacked.shape, 0.8, np.float32), 1, 1
    )
    flops = {reduction: float(reduction.patches) for reduction in reductions}
    return Table(LEVELS, BLENDS, named[0], labels if labelled else None, (view,), flops, flops, 64.0, 64.0)


def test_every_policy_is_judged_by_what_runs(models, answers):
    """Random policies of the sweep give the same answers and FLOPs in the engine."""
    model, guidance = models
    table, swept = answers.table, sweep(answers.table)
    assert len(swept.cost) > 100_000
    assert [view.input_size for view in table.views] == [(128, 128), (96, 96), (64, 64)]
    images = torch.cat([images for images, _ in batches()])
    for number in np.random.default_rng(0).integers(0, len(swept.cost), 12).tolist():
        view, policy = swept.policy(number)
        judged = judge(table, view, policy)
        sized = tdk.Guidance(guidance.model, table.views[view].input_size, guidance.mean, guidance.std)
        tdk.patch(model, sized, policy)
        with torch.inference_mode():
            named = model(images).argmax(1)
        report = model.tinydrop.report()
        tdk.unpatch(model)
        assert np.array_equal(table.losses(named.numpy()), judged.losses), policy
        assert report.flops / report.dense_flops == pytest.approx(judged.cost), policy
        assert swept.cost[number] == pytest.approx(judged.cost, rel=1e-5)
        assert swept.loss[number] == pytest.approx(judged.losses.mean())
        assert swept.moved[number] == pytest.approx(np.abs(judged.losses).mean())


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (8, 12), (3, 3)])
def test_the_law_of_a_cell_gives_that_cell(grid):
    from tinydrop_kernels.families.grids import coarser_grids
    from tinydrop_kernels.ops import apply_law

    levels = coarser_grids(grid)
    for reduction in whole_reductions(levels) + drop_reductions(levels):
        counts, level = apply_law(torch.tensor([0.1, 0.5, 0.69, 0.71]), levels, law_of(reduction, levels, 0.7))
        assert counts.tolist() == [reduction.patches] * 3 + [0], reduction
        assert level[:3].tolist() == [reduction.level] * 3, reduction


def test_what_was_not_run_is_not_judged(answers):
    for policy in (tdk.DropPolicy(coarsen=0.5), tdk.DropPolicy(blend=0.33), tdk.DropPolicy.fixed(0.6)):
        with pytest.raises(ValueError, match="were not run"):
            judge(answers.table, 0, policy)


def test_the_model_is_put_back(models, answers):
    assert not hasattr(models[0], "tinydrop")


def test_nothing_is_asked_twice(models, tmp_path, monkeypatch):
    """After an interruption in the third batch, a calibration does not run the first two batches again."""
    model, guidance = models
    data = batches()

    def interrupted():
        yield from data[:2]
        raise KeyboardInterrupt

    asked = []
    timed = collection.timed
    monkeypatch.setattr(collection, "timed", lambda call, images: (asked.append(0), timed(call, images))[1])
    with pytest.raises(KeyboardInterrupt):
        gather(model, [guidance], interrupted(), cache=tmp_path, progress=False)
    assert not hasattr(model, "tinydrop")
    each = len(asked) // 2
    assert len(asked) == 2 * each and each > 10
    again = gather(model, [guidance], data, cache=tmp_path, progress=False)
    assert len(asked) == 3 * each
    gather(model, [guidance], reversed(data), cache=tmp_path, progress=False)
    assert len(asked) == 3 * each, "the order of the batches does not matter"
    other = tdk.Guidance(tiny_guidance(), (128, 128))
    gather(model, [guidance, other], data, cache=tmp_path, progress=False)
    assert 3 * each < len(asked) < 6 * each, (
        "answers that do not depend on the guidance model are reused for another one"
    )
    fresh = gather(model, [guidance], data, progress=False)
    assert np.array_equal(again.table.views[0].answers, fresh.table.views[0].answers)
    assert again.images == fresh.images


def test_guidance_sees_a_batch_once_at_each_size_and_for_each_saliency(models, tmp_path, monkeypatch):
    """A guidance model whose answers are cached is not run at all."""
    model, guidance = models
    seen, forward = [], tdk.Guidance.forward

    def counted(self, images, mean, std, saliency):
        seen.append((self.input_size, saliency))
        return forward(self, images, mean, std, saliency)

    monkeypatch.setattr(tdk.Guidance, "forward", counted)
    given = {"cache": tmp_path, "random_drop": True, "progress": False}
    gather(model, [guidance], batches(2), **given)
    each = [((128, 128), CALM), ((128, 128), PLAIN), ((96, 96), CALM), ((64, 64), CALM)]
    assert sorted(seen) == sorted(2 * each)
    gather(model, [guidance], batches(2), **given)
    assert len(seen) == 8


def test_candidates_get_cheaper():
    table = made_up()
    swept = sweep(table)
    candidates = in_order(swept, 0.02)
    costs = [judge(table, *candidate).cost for candidate in candidates]
    assert len(costs) > 5 and all(cheaper < dear for dear, cheaper in pairwise(costs)) and max(costs) < 1


def test_testing_ends_at_the_first_failure():
    table = made_up(1000)
    harmless, harmful = (Candidate(0, tdk.DropPolicy.fixed(share, coarsen=1.0)) for share in (1.0, 0.25))
    nothing = Finding(None, 0, np.zeros(0, np.int8), 0, 0.0)
    found = in_sequence(nothing, table, [harmless, harmful, harmless], 0.01, 0.9)
    assert found.chosen is harmless and found.tried == 2
    assert in_sequence(nothing, table, [harmful, harmless], 0.01, 0.9).chosen is None


@pytest.mark.parametrize("labelled", [True, False])
def test_certificates_hold(labelled):
    """At most one in ten of 1,000 samples from a population certifies a policy that loses too much.

    In the population, the first coarser grid loses slightly more than the stated drop.
    """
    population, drop, confidence, draws = made_up(4000, labelled=labelled), 0.015, 0.9, 1000
    candidates = [Candidate(0, tdk.DropPolicy.fixed(rows * rows / 64, coarsen=1.0)) for rows, _ in LEVELS]
    losses = [judge(population, *candidate).losses.mean() for candidate in candidates]
    assert losses[0] == 0 < losses[1] and drop < losses[1] < 1.3 * drop
    rng, wrong = np.random.default_rng(0), 0
    nothing = Finding(None, 0, np.zeros(0, np.int8), 0, 0.0)
    for _ in range(draws):
        drawn = population.take(rng.integers(0, len(population), 300))
        wrong += in_sequence(nothing, drawn, candidates, drop, confidence).chosen != candidates[0]
    assert 0 < wrong / draws <= 1 - confidence + 3 * math.sqrt(0.1 * 0.9 / draws)


def test_few_images_certify_nothing_and_it_is_said(answers):
    policy = answers.certified(0.005, 0.9)
    certificate = policy.certificate
    assert not certificate.passed and certificate.least_drop == least_drop(certificate.tested, 0.9) > 0.005
    assert "with 48 images the smallest drop that can be certified is" in str(policy)
    assert "The dense model" in str(policy) and "would need about 581" in str(policy)
    assert policy.policy == tdk.DropPolicy(None, math.inf, 1.0, 1.0, 0.0, None)


def certified(models, answers, labelled: bool = True, drop: float = 0.05):
    """Return a certified policy for made-up answers.

    The tiny models' own answers differ too little between reductions to certify any saving.
    """
    return replace(answers, table=made_up(2000, labelled=labelled)).certified(drop)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_certificate_in_words(models, answers, labelled):
    policy = certified(models, answers, labelled)
    told = str(policy)
    assert policy.certificate.passed and policy.cost < 1
    assert ("of accuracy, at 90% confidence" in told) is labelled
    assert ("unlike the dense model" in told) is not labelled
    assert "Best without a certificate" in told and policy.uncertified.cost <= policy.cost


def test_several_guidance_models_share_the_doubt(answers):
    table = made_up(2000)
    two = replace(table, views=(table.views[0], replace(table.views[0], guidance=1, flops=4.0)))
    compared = replace(answers, table=two, guidances=answers.guidances * 2).compared(0.05)
    assert [policy.certificate.confidence for policy in compared] == [0.95, 0.95]
    assert compared[0].cost < compared[1].cost


def test_cost_in_time():
    table = made_up(2000)
    view = replace(table.views[0], seconds=200.0)  # too slow to pay off, although it has few FLOPs
    slow = replace(table, views=(view,))
    assert certify(slow, 0.05, 0.9, "time").chosen is None
    assert certify(slow, 0.05, 0.9, "flops").chosen is not None
    assert uncertified_best(slow, 0.05, "time") is None


def test_a_policy_file_goes_there_and_back(models, answers, tmp_path):
    for policy in (certified(models, answers), answers.certified(0.005)):
        policy.save(tmp_path / "policy.json")
        assert tdk.CalibratedPolicy.load(tmp_path / "policy.json") == policy
        assert json.loads((tmp_path / "policy.json").read_text())["in_words"] == str(policy)


def test_a_policy_file_of_the_first_format_is_read(models, answers, tmp_path):
    policy = certified(models, answers)
    policy.save(tmp_path / "policy.json")
    values = json.loads((tmp_path / "policy.json").read_text()) | {"format": "tinydrop policy 1"}
    values["model"] = values.pop("target")
    for holder in filter(None, (values, values["uncertified"])):
        holder["policy"]["saliency"]["centre"] = holder["policy"]["saliency"].pop("center")
    (tmp_path / "old.json").write_text(json.dumps(values))
    assert tdk.CalibratedPolicy.load(tmp_path / "old.json") == policy


def test_patch_takes_the_file(models, answers, tmp_path):
    model, guidance = models
    policy = replace(certified(models, answers), input_size=(96, 96))
    policy.save(tmp_path / "policy.json")
    for given in (policy, tmp_path / "policy.json", str(tmp_path / "policy.json")):
        tdk.patch(model, guidance, given)
        assert model.tinydrop.policy == policy.policy and model.tinydrop.guidance.input_size == (96, 96)
        tdk.unpatch(model)


def test_patch_refuses_it_for_others(models, answers, tmp_path):
    model, guidance = models
    policy = certified(models, answers)
    torch.manual_seed(5)
    other = tiny_vit(img_size=64)
    with pytest.raises(tdk.PolicyFileError, match="calibrated for the target .*other weights"):
        tdk.patch(other, guidance, policy)
    with pytest.raises(tdk.PolicyFileError, match="calibrated for the guidance .*only the name is the same"):
        tdk.patch(model, tiny_guidance(), policy)
    with pytest.raises(tdk.PolicyFileError, match="a target of 5 classes, got 7"):
        tdk.patch(tiny_vit(img_size=64, num_classes=7), guidance, policy)
    assert not hasattr(model, "tinydrop")
    with pytest.raises(tdk.PolicyFileError, match="cannot be read"):
        tdk.patch(model, guidance, tmp_path / "none.json")
    for text in ("{}", "[1]", "nonsense", '{"format": "tinydrop policy 1"}', '{"format": "another"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(tdk.PolicyFileError, match="is no policy file"):
            tdk.patch(model, guidance, tmp_path / "bad.json")


def test_another_dtype_is_told(models, answers):
    model, guidance = models
    policy = certified(models, answers)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="in float32, which is in bfloat16 now"):
        tdk.patch(tiny_vit(img_size=64).bfloat16(), guidance, policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tdk.unpatch(tdk.patch(model, guidance, policy))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accuracy_drop": 0.0}, "accuracy_drop: got 0.0, expected"),
        ({"accuracy_drop": 1}, "accuracy_drop: got 1, expected"),
        ({"confidence": 1.5}, "confidence: got 1.5, expected"),
        ({"cost": "money"}, "cost: got 'money', expected"),
        ({"names": ["one"]}, "names: got 1 for 16 images"),
    ],
)
def test_calibrate_refuses(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        tdk.calibrate(*models, batches(1), progress=False, **arguments)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "got no images"),
        ([(torch.randn(2, 3, 64, 64), torch.tensor([0, 5]))], "got labels 0 to 5, expected 0 to 4"),
        ([(torch.randn(2, 3, 64, 64), torch.tensor([0.0, 1.0]))], "expected whole numbers"),
        ([torch.randn(2, 3, 64, 64), *batches(1)], "expected one kind"),
        (["text"], "got a batch of str"),
    ],
)
def test_loaders_are_looked_at(models, loader, message):
    with pytest.raises((ValueError, TypeError), match=message):
        tdk.calibrate(*models, loader, progress=False)
    assert not hasattr(models[0], "tinydrop")


def test_calibrate_without_labels(models):
    policy = tdk.calibrate(*models, batches(1, labelled=False), accuracy_drop=0.5, progress=False, names=list("a" * 16))
    assert not policy.certificate.labelled and policy.images["count"] == 16 and "names" in policy.images


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_frontier(answers, tmp_path, ending):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    table = made_up(1000)
    policy = replace(answers, table=table).certified(0.05)
    points = frontier(table, [policy])
    for way in ("TinyDrop", "exits alone", "resolution alone"):
        for by in ("flops", "time"):
            line = [point for point in points if (point.way, point.by) == (way, by)]
            assert all(a.cost <= b.cost and a.score < b.score for a, b in pairwise(line)) and line
    chosen = next(point for point in points if point.way.startswith("certified"))
    assert chosen.low < chosen.score < chosen.high
    draw(points, tmp_path / f"frontier.{ending}", table)
    assert (tmp_path / f"frontier.{ending}").stat().st_size > 5_000
    write_csv(points, tmp_path / "frontier.csv")
    rows = (tmp_path / "frontier.csv").read_text().splitlines()
    assert rows[0] == "way,by,cost,score,low,high" and len(rows) == len(points) + 1


def test_random_drop_is_a_line_and_no_policy(answers):
    assert any(point.way == "random drop" for point in frontier(answers.table))
    assert Reduction(0, 25, None, random=True) in answers.table.views[0].reductions


def test_the_picture_says_what_is_missing(answers, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match="needs matplotlib"):
        draw(frontier(made_up(50)), tmp_path / "f.png", made_up(50))
