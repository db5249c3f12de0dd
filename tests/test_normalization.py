"""Images that are normalised with another mean or standard deviation than in the model's ``pretrained_cfg``."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import steps
from tinydrop_kernels.visualize.pictures import as_pictures

OTHER = {"mean": (0.1, 0.4, 0.7), "std": (0.5, 0.9, 0.3)}


def own(model):
    return {name: torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std")}


@pytest.mark.parametrize("given", [("mean", "std"), ("mean",), ("std",)], ids=" and ".join)
@torch.inference_mode()
def test_the_guidance_sees_the_same_image(given):
    """The guidance model is given the same pixels under any normalisation. The target is given the images unchanged."""
    vit, guidance = tiny_vit(), tiny_guidance()
    statistics = own(vit)
    other = statistics | {name: torch.tensor(OTHER[name])[:, None, None] for name in given}
    pixels = varied_images(6) * statistics["std"] + statistics["mean"]
    usual, told = ((pixels - way["mean"]) / way["std"] for way in (statistics, other))
    wanted = tdk.patch(copy.deepcopy(vit), guidance)
    model = tdk.patch(copy.deepcopy(vit), guidance, **{name: list(OTHER[name]) for name in given})
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        guided = steps.guide(one.tinydrop, told)
        torch.testing.assert_close(guided.logits, steps.guide(wanted.tinydrop, usual).logits, atol=1e-3, rtol=1e-4)
    assert (steps.guide(wanted.tinydrop, told).logits - guided.logits).abs().max() > 0.1
    keep_all = tdk.DropPolicy(tau=None, gamma=0.0, min_keep=1.0, blend=0.0, second_look=None)
    model.tinydrop.policy = keep_all
    torch.testing.assert_close(model(told), vit(told), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_pictures_are_undone_by_it():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    vit = tdk.patch(tiny_vit(), tiny_guidance(), **OTHER)
    vit.pretrained_cfg |= {"crop_pct": 1.0}
    seen = next(iter(tdk.Predictor(vit).batches(pixels)))
    assert np.array_equal(np.asarray(as_pictures(vit, seen.images)[0]), pixels[0])


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize(
    "values",
    [0.5, (0.5,), (0.5,) * 4, (0.5, 0.5, float("nan")), (0.5, 0.5, True), "abc", (0.5, None, 0.5)],
    ids=str,
)
def test_other_values_are_refused_by_name(vit, name, values):
    with pytest.raises(ValueError, match=f"^{name}: got .*, expected 3 finite numbers.*, one for each channel"):
        tdk.patch(vit, tiny_guidance(), **{name: values})
    assert not hasattr(vit, "tinydrop")


def test_a_deviation_is_above_zero(vit):
    with pytest.raises(ValueError, match=r"^std: got \(0.5, 0.0, 0.5\), expected 3 finite numbers above 0"):
        tdk.patch(vit, tiny_guidance(), std=(0.5, 0.0, 0.5))
    tdk.patch(vit, tiny_guidance(), mean=(0.0, -1.0, 0.0))
