"""Tests of the law: from the confidence to an exit, a grid and a number of patches."""

import math

import pytest
import torch

from tinydrop_kernels.ops import Law, apply_law

from .selection_oracle import assert_obeys, budget_of

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

GRID_LISTS = [
    [(14, 14)],
    [(14, 14), (12, 12), (10, 10), (9, 9), (7, 7)],
    [(37, 37), (32, 32), (28, 28), (23, 23), (19, 19)],
    [(16, 12), (12, 9), (8, 6)],
    [(5, 7), (1, 1)],
]
some_grids = st.sampled_from(GRID_LISTS)
some_laws = st.builds(
    Law,
    tau=st.one_of(st.none(), st.floats(0.0625, 1.0, width=32)),  # the law compares in float32
    gamma=st.one_of(st.floats(0.0, 50.0), st.just(math.inf)),
    min_keep=st.floats(0.01, 1.0),
    coarsen=st.floats(0.0, 1.0),
)
confidences = st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=20)
few = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@few
@hypothesis.given(confidences, some_grids, some_laws)
def test_is_the_formula(values, grids, law):
    counts, levels = apply_law(torch.tensor(values), grids, law)
    assert counts.dtype == levels.dtype == torch.int32
    assert_obeys(counts, levels, torch.tensor(values), grids, law)


@few
@hypothesis.given(confidences, some_grids, some_laws)
def test_the_surer_the_fewer_and_the_coarser(values, grids, law):
    counts, levels = apply_law(torch.tensor(sorted(values)), grids, law)
    assert (counts.diff() <= 0).all()
    staying = levels[counts > 0]
    assert (staying.diff() >= 0).all()


@few
@hypothesis.given(confidences, some_grids, some_laws)
def test_never_more_than_the_grid_has(values, grids, law):
    counts, levels = apply_law(torch.tensor(values), grids, law)
    sizes = torch.tensor([rows * columns for rows, columns in grids])
    exits = torch.tensor([law.tau is not None and c > torch.tensor(law.tau) for c in torch.tensor(values)])
    assert ((counts == 0) == exits).all()
    assert (counts <= sizes[levels.long()]).all()


@few
@hypothesis.given(st.floats(0.0, 1.0, width=32), some_grids, some_laws)
def test_the_budget_is_met_within_half_a_level(value, grids, law):
    """Check that the patches spent differ from the budget by at most half the distance to the next level."""
    (count,), (level,) = (t.tolist() for t in apply_law(torch.tensor([value]), grids, law))
    hypothesis.assume(count > 0)
    dense = grids[0][0] * grids[0][1]
    sides = [math.sqrt(rows * columns / dense) for rows, columns in grids]
    spent, wanted = count, dense * budget_of(value, law)
    least = (sides[level] / (sides[level] + sides[level - 1]) * 2) ** 2 if level else 1.0
    assert spent >= least * wanted * (1 - 1e-4) - 0.01
    if level + 1 < len(grids):
        most = (sides[level] / (sides[level] + sides[level + 1]) * 2) ** 2
        assert spent <= most * wanted * (1 + 1e-4) + 1


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.3, 0.5, 0.99, 1.0])
def test_coarsen_0_drops_alone(budget):
    counts, levels = apply_law(torch.tensor([0.5]), [(14, 14), (10, 10), (7, 7)], Law(None, 0.0, budget, 0.0))
    assert levels.tolist() == [0] and counts.tolist() == [math.ceil(196 * budget - 1e-3)]


BORDERS = [(1.0, 0), (0.74, 0), (0.72, 1), (0.5, 1), (0.37, 1), (0.36, 2), (0.01, 2)]


@pytest.mark.parametrize(("budget", "level"), BORDERS)
def test_coarsen_1_is_resolution_alone(budget, level):
    """Check that all patches of the nearest grid are kept. Grids of 14 and 10 meet at a budget of (12 / 14) ** 2."""
    grids = [(14, 14), (10, 10), (7, 7)]
    counts, levels = apply_law(torch.tensor([0.5]), grids, Law(None, 0.0, budget, 1.0))
    assert levels.tolist() == [level] and counts.tolist() == [grids[level][0] * grids[level][1]]


@pytest.mark.parametrize("coarsen", [0.0, 0.5, 1.0])
def test_limits_of_gamma_hold_for_any_confidence(coarsen):
    """Check that gamma = 0 spends min_keep and gamma = inf everything at any confidence. NaN keeps everything."""
    values, grids = torch.tensor([0.0, 0.3, 1.0, math.nan]), [(16, 16), (8, 8)]
    counts, levels = apply_law(values, grids, Law(None, math.inf, 0.25, coarsen))
    assert counts.tolist() == [256] * 4 and levels.tolist() == [0] * 4
    counts, levels = apply_law(values, grids, Law(None, 0.0, 0.25, coarsen))
    kept = {0.0: 64, 0.5: 32, 1.0: 64}[coarsen]  # for 0.5: half the patches of the 8 x 8 grid
    assert counts.tolist() == [kept] * 3 + [256]
    assert levels.tolist() == [0 if coarsen == 0 else 1] * 3 + [0]


def test_a_quarter_of_196_is_49():
    """Check that rounding does not make the count 50, although float32 computes 0.25 by a power and a difference."""
    confidence = torch.tensor([0.75])
    assert apply_law(confidence, [(14, 14)], Law(None, 1.0, 0.01))[0].tolist() == [49]
    assert apply_law(confidence * 0.9, [(14, 14)], Law(0.9, 1.0, 0.01))[0].tolist() == [49]
