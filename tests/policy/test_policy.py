"""Arguments that a policy accepts, and its named special cases. The law itself is tested with the operators."""

import dataclasses
import math

import numpy as np
import pytest

from tinydrop_kernels import DropPolicy, Saliency


def test_numbers_of_any_kind_are_numbers():
    policy = DropPolicy(np.float32(0.5), np.int64(2), np.float64(0.25), 1, second_look=[0, np.float32(0.5)])
    assert policy == DropPolicy(0.5, 2.0, 0.25, 1.0, second_look=(0.0, 0.5))
    assert all(type(v) is float for v in (*dataclasses.astuple(policy)[:4], *policy.second_look))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": 0}, ValueError, "tau: got 0.0, expected a number in"),
        ({"tau": 1.01}, ValueError, "tau: got 1.01"),
        ({"tau": math.nan}, ValueError, "tau: got nan"),
        ({"tau": True}, TypeError, "tau: got True, expected a number"),
        ({"tau": "0.5"}, TypeError, "tau: got '0.5', expected a number"),
        ({"gamma": -1}, ValueError, "gamma: got -1.0"),
        ({"gamma": None}, TypeError, "gamma: got None"),
        ({"min_keep": 0}, ValueError, "min_keep: got 0.0"),
        ({"min_keep": 1.5}, ValueError, "min_keep: got 1.5"),
        ({"coarsen": -0.1}, ValueError, "coarsen: got -0.1"),
        ({"coarsen": "no"}, TypeError, "coarsen: got 'no'"),
        ({"blend": 1}, ValueError, "blend: got 1.0"),
        ({"second_look": 0.5}, ValueError, "second_look: got 0.5, expected a pair"),
        ({"second_look": (0.5,)}, ValueError, "second_look: got"),
        ({"second_look": (0.5, 1.5)}, ValueError, "second_look: got"),
        ({"saliency": "cam"}, TypeError, "saliency: got 'cam', expected an ops.Saliency"),
        ({"saliency": Saliency(classes=0)}, ValueError, "saliency: got"),
        ({"saliency": Saliency(norm=-1.0)}, ValueError, "saliency: got"),
    ],
    ids=str,
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        DropPolicy(**change)


@pytest.mark.parametrize("keep_ratio", [0, 1.5, math.nan, True, "all"])
def test_fixed_refuses_by_its_own_name(keep_ratio):
    with pytest.raises(ValueError, match="^keep_ratio: got"):
        DropPolicy.fixed(keep_ratio)


def test_special_cases():
    assert DropPolicy.fixed(0.3).law == (None, 0.0, 0.3, 0.0)
    assert DropPolicy.cascade(0.8).law[:2] == (0.8, math.inf)
    assert not DropPolicy.fixed(0.3).mixes_answers
    assert DropPolicy.cascade(0.8).mixes_answers
    assert DropPolicy.fixed(0.3, blend=0.1).mixes_answers
    assert DropPolicy(None, blend=0.0).mixes_answers, "it looks twice"
    assert not DropPolicy(None, blend=0.0, second_look=None).mixes_answers
