"""Every property that the law of docs/how-it-works.md promises."""

import math

import pytest
import torch

from tinydrop_kernels import DropPolicy

CONFIDENCES = torch.linspace(0, 1, 1001)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0, 7.0])
@pytest.mark.parametrize("tau", [0.35, 0.8, 1.0, None])
def test_surer_never_keeps_more(tau, gamma):
    counts = DropPolicy(tau, gamma, min_keep=0.05).keep_counts(CONFIDENCES, 196)
    assert (counts.diff() <= 0).all()


@pytest.mark.parametrize("tau", [0.35, 0.8, 1.0])
def test_exits_exactly_above_tau(tau):
    counts = DropPolicy(tau).keep_counts(CONFIDENCES, 196)
    assert torch.equal(counts == 0, CONFIDENCES > tau)


def test_without_tau_nothing_exits():
    assert (DropPolicy(tau=None).keep_counts(CONFIDENCES, 196) > 0).all()


def test_limits_of_confidence():
    policy = DropPolicy(tau=0.8, gamma=2.0, min_keep=0.25)
    assert policy.keep_counts(torch.tensor([0.0, 0.8]), 196).tolist() == [196, 49]


def test_law_by_hand():
    policy = DropPolicy(tau=0.8, gamma=2.0, min_keep=0.1)
    # keep = 1 - (0.4 / 0.8) ** 2 = 0.75
    assert policy.keep_counts(torch.tensor([0.4]), 196).tolist() == [147]
    assert DropPolicy(None, 1.0, 0.1).keep_counts(torch.tensor([0.5]), 197).tolist() == [99]


def test_low_gamma_is_aggressive():
    kept = [DropPolicy(0.9, gamma, 0.01).keep_counts(CONFIDENCES, 196).sum() for gamma in (0, 0.5, 1, 2, 8, math.inf)]
    assert kept == sorted(kept) and len(set(kept)) == len(kept)


def test_infinite_gamma_is_a_cascade():
    counts = DropPolicy.cascade(0.8).keep_counts(torch.tensor([0.0, 0.5, 0.8, 0.81]), 196)
    assert counts.tolist() == [196, 196, 196, 0]


@pytest.mark.parametrize("num_patches", [1, 2, 7, 196, 197, 256, 1369, 4096])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0])
def test_fixed_ratio_is_exact(num_patches, keep_ratio):
    counts = DropPolicy.fixed(keep_ratio).keep_counts(torch.rand(50), num_patches)
    exact = math.ceil(round(num_patches * keep_ratio, 6))
    assert set(counts.tolist()) == {max(1, exact)}


def test_at_least_one_patch_and_at_least_min_keep():
    policy = DropPolicy(tau=1.0, gamma=0.1, min_keep=0.001)
    assert policy.keep_counts(torch.tensor([1.0]), 196).tolist() == [1]


def test_no_confidence_keeps_everything():
    for gamma in (0.0, 2.0, math.inf):
        assert DropPolicy(0.8, gamma).keep_counts(torch.tensor([float("nan")]), 196).tolist() == [196]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("tau", 0.0),
        ("tau", -0.1),
        ("tau", 1.01),
        ("tau", math.nan),
        ("gamma", -1.0),
        ("gamma", math.nan),
        ("min_keep", 0.0),
        ("min_keep", 1.5),
        ("min_keep", math.nan),
    ],
)
def test_out_of_range(argument, value):
    with pytest.raises(ValueError, match=f"^{argument}: got {value}"):
        DropPolicy(**{argument: value})


@pytest.mark.parametrize("keep_ratio", [0.0, -1.0, 1.1, math.nan])
def test_fixed_ratio_out_of_range(keep_ratio):
    with pytest.raises(ValueError, match=f"^keep_ratio: got {keep_ratio}"):
        DropPolicy.fixed(keep_ratio)
