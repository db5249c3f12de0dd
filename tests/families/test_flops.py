"""Tests that compare the FLOP formulas with ``torch.utils.flop_counter``, dense, packed, and with second looks."""

import pytest
import torch
from counting import counted
from helpers import tiny_guidance, tiny_vit, varied_images
from slow import mostly_slow
from zoo import MODELS, QUICK, make

import tinydrop_kernels as tdk
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families.flops import count_flops


@pytest.mark.parametrize("key", mostly_slow(MODELS, *QUICK))
@pytest.mark.filterwarnings("ignore:.*keeps its dense grid")
def test_dense_and_packed(key):
    model, images = make(key)
    model.requires_grad_(False)  # the counter fails on a latent query that requires a gradient
    family = family_of(model)
    dense = family.dense_flops(model, len(images), family.grid_size(model, images))
    assert dense == counted(model, images)
    policy = tdk.DropPolicy(tau=0.5, gamma=1.0, min_keep=0.1, coarsen=0.5, blend=0.0, second_look=None)
    if model.num_classes == 0:
        policy = tdk.DropPolicy.fixed(0.5, coarsen=0.5)
    tdk.patch(model, tiny_guidance(), policy)
    total = counted(model, images)
    report = model.tinydrop.report()
    assert report.dense_flops == dense
    # timm projects the latent query of a map pool once per image, the packed pool once per batch
    slack = 2 * model.embed_dim**2 * len(images) if model.global_pool == "map" else 0
    assert report.flops == pytest.approx(total, rel=0, abs=slack)


def test_second_looks_and_levels_are_counted():
    model = tiny_vit(img_size=128, depth=3)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy(0.6, 1.0, 0.1, 0.5, 0.2, (1.0, 1.0)))
    images = varied_images(12, 128)
    total = counted(model, images)
    report = model.tinydrop.report()
    assert 0 < report.exits < 12 and report.coarser and report.second_looks
    assert report.flops == total


def test_guidance_is_counted_where_it_is():
    guidance = tdk.Guidance(tiny_guidance())
    image = torch.randn(1, 3, *guidance.input_size)
    assert count_flops(guidance.model, tuple(image.shape[1:])) == counted(guidance.model, image)
    assert next(guidance.parameters()).device.type == "cpu", "counting leaves the model where it is"


def test_another_guidance_is_counted_anew():
    model, images = tdk.patch(tiny_vit(), tiny_guidance()), varied_images(4)
    model(images)
    first = model.tinydrop.report().guidance_flops
    model.tinydrop.guidance = model.tinydrop.guidance.at_size((64, 64))
    model(images)
    guidance, image = model.tinydrop.guidance.model, torch.randn(1, 3, 64, 64)
    assert model.tinydrop.report().guidance_flops == 4 * counted(guidance, image) < first


def test_a_stem_is_counted_once(monkeypatch):
    """Check that the stem is counted once, because counting copies the module and costs more than a call."""
    model, images = make("convolutional stem")
    with pytest.warns(UserWarning, match="keeps its dense grid"):
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5, coarsen=0.5))
    model(images)
    first = model.tinydrop.report()
    monkeypatch.setattr("copy.deepcopy", lambda *_: pytest.fail("it was copied again"))
    assert model.tinydrop.report() == first


def test_quantised_layers_cost_what_they_did():
    model, images = tiny_vit(), varied_images(4)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    model(images)
    wanted = model.tinydrop.report()
    # The last block of a quantised model runs for all tokens, because its projections are no longer nn.Linear.
    quantised = torch.ao.quantization.quantize_dynamic(tiny_vit(), {torch.nn.Linear})
    tdk.patch(quantised, tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    quantised(images)
    report = quantised.tinydrop.report()
    assert report.dense_flops == wanted.dense_flops
    assert wanted.flops < report.flops < wanted.flops + wanted.dense_flops
