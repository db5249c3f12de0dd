"""Tests of the statistical bounds against the binomial, a betting bound, MAPIE and simulations."""

import math

import numpy as np
import pytest
from slow import mostly_slow

from tinydrop_kernels.calibration.bounds import counts_of, least_drop, p_value, upper_bound


def binomial_tail(most: int, images: int, chance: float) -> float:
    return sum(math.comb(images, k) * chance**k * (1 - chance) ** (images - k) for k in range(most + 1))


@pytest.mark.parametrize(("images", "bound"), [(100, 0.05), (540, 0.01), (1000, 0.005)])
def test_without_gains_it_is_the_binomial(images, bound):
    for lost in range(int(images * bound)):
        exact = binomial_tail(lost, images, bound)
        assert p_value(lost, 0, images, bound, can_gain=False) == pytest.approx(exact, rel=1e-6)
        assert exact <= p_value(lost, 0, images, bound) <= exact + 0.03


def test_more_losses_speak_less_and_more_gains_more():
    assert p_value(2, 0, 600, 0.01) < p_value(3, 0, 600, 0.01) < p_value(6, 0, 600, 0.01) == 1
    assert p_value(6, 3, 600, 0.01) > p_value(6, 6, 600, 0.01)
    assert p_value(0, 0, 0, 0.01) == 1


@pytest.mark.parametrize("share", [0.0, 0.002, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("images", mostly_slow([60, 300, 900], 60))
def test_it_errs_no_more_often_than_it_says(share, images):
    """At most one in ten of 1,000 random samples of a policy that loses exactly the bound passes."""
    bound, confidence, draws = 0.02, 0.9, 1000
    rng = np.random.default_rng(images)
    shares = [share + bound, share, 1 - 2 * share - bound]
    lost, gained, _ = rng.multinomial(images, shares, size=draws).T
    passed = sum(
        p_value(a, b, images, bound) <= 1 - confidence for a, b in zip(lost.tolist(), gained.tolist(), strict=True)
    )
    assert passed / draws <= 1 - confidence + 3 * math.sqrt(0.1 * 0.9 / draws)


def betting_p_value(losses: np.ndarray, bound: float) -> float:
    """Return the p-value of Waudby-Smith and Ramdas, arXiv 2010.09686.

    It is an even mixture of bets with constant stakes, stopped at its highest capital.
    """
    stakes = np.geomspace(0.005, 0.999, 32)[:, None] / (1 - bound)
    capital = np.exp(np.cumsum(np.log1p(stakes * (bound - losses)), axis=1)).mean(0)
    return min(1.0, 1 / capital.max())


def test_it_needs_far_fewer_images_than_a_betting_bound():
    rng = np.random.default_rng(0)
    draws = [rng.choice([1, -1, 0], size=900, p=[0.006, 0.006, 0.988]) for _ in range(100)]
    ours = sum(p_value(*counts_of(losses), 0.01) <= 0.1 for losses in draws)
    betting = sum(betting_p_value(losses, 0.01) <= 0.1 for losses in draws)
    assert ours > betting + 20


def test_it_agrees_with_mapie():
    """The p-value equals that of MAPIE for losses of 0 or 1."""
    pytest.importorskip("mapie", reason="compares with MAPIE, which is not installed")
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    for lost in range(8):
        risk, bound = np.array([lost / 900]), np.array([0.01])
        theirs = compute_hoeffding_bentkus_p_value(risk, 900, bound, binary=True).item()
        assert p_value(lost, 0, 900, 0.01, can_gain=False) == pytest.approx(theirs, rel=1e-6)


def test_what_so_many_images_can_certify():
    least = least_drop(500, 0.9)
    assert p_value(0, 0, 500, least * 1.01) < 0.1 < p_value(0, 0, 500, least * 0.99)
    assert least_drop(460, 0.9) <= 0.005 < least_drop(459, 0.9)
    assert least_drop(0, 0.9) == 1


def test_upper_bound_is_where_the_test_turns():
    bound = upper_bound(3, 1, 500, 0.9)
    assert p_value(3, 1, 500, bound + 1e-4) <= 0.1 < p_value(3, 1, 500, bound - 1e-3)
    assert 2 / 500 < bound < 0.02
