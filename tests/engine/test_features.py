"""``model.tinydrop.features`` gives timm's own features, patch by patch."""

import copy

import pytest
import torch
from helpers import masked_features, spread_confidence, tiny_guidance, tiny_vit, varied_images
from zoo import make

import tinydrop_kernels as tdk
from tinydrop_kernels.engine import steps
from tinydrop_kernels.families import family_of

KEYS = ["augreg", "not square", "dinov2 registers", "deit distilled", "siglip map", "beit", "dinov3", "rope, mixed"]


def in_nchw(model, tokens, grid):
    return tokens[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)


@pytest.mark.parametrize("key", [*KEYS, "aimv2", "convolutional stem"])
@torch.inference_mode()
def test_everything_kept_is_timm(key):
    model, images = make(key)
    wanted = in_nchw(model, model.forward_features(images), family_of(model).grid_size(model, images))
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(1.0))
    features, mask = model.tinydrop.features(images)
    assert mask.all() and mask.shape == (len(images), *wanted.shape[2:])
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("coarsen", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("key", KEYS)
@torch.inference_mode()
def test_each_place_shows_the_nearest_kept_patch(key, coarsen):
    """Features are timm's on the image's own grid with dropped keys masked, each taken from the nearest kept patch."""
    model, images = make(key)
    images = torch.cat([images, images.flip(0) * 2])
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy(0.9, 1.0, 0.15, coarsen))
    model.tinydrop.guidance.register_forward_hook(spread_confidence)
    features, mask = model.tinydrop.features(images)
    plan = steps.plan(model.tinydrop, images, policy=tdk.DropPolicy(None, 1.0, 0.15, coarsen))
    rows, columns = dense = plan.levels[0]
    height, width = model.patch_embed.proj.weight.shape[-2:]
    tdk.unpatch(model)
    assert not mask.all() or coarsen == 1
    for b, (level, indices) in enumerate(zip(plan.selection.levels, plan.selection.indices, strict=True)):
        own_rows, own_columns = grid = plan.levels[level]
        kept = indices[indices >= 0].long()
        own, image = copy.deepcopy(model), images[b : b + 1]
        if grid != dense:
            size = (own_rows * height, own_columns * width)
            image = torch.nn.functional.interpolate(image, size=size, mode="bicubic", antialias=True)
            own.set_input_size(img_size=size)
        seen = torch.ones(own.num_prefix_tokens + own_rows * own_columns, dtype=torch.bool)
        seen[own.num_prefix_tokens :] = torch.isin(torch.arange(own_rows * own_columns), kept)
        wanted = masked_features(own, image, seen)[0, own.num_prefix_tokens :]
        scale = torch.tensor([rows / own_rows, columns / own_columns])
        every = torch.arange(own_rows * own_columns)
        centers = (torch.stack((every // own_columns, every % own_columns), 1) + 0.5) * scale
        for row in range(rows):
            for column in range(columns):
                distance = (centers - torch.tensor([row + 0.5, column + 0.5])).square().sum(1)
                nearest = kept[distance[kept] <= distance[kept].min() + 1e-4]  # several if equally near
                off = (wanted[nearest] - features[b, :, row, column]).abs().amax(1).min()
                assert off <= 1e-4 * wanted.abs().max()
                assert mask[b, row, column] == (distance[kept].min() <= distance.min() + 1e-4)


@torch.inference_mode()
def test_bad_images_are_refused_and_nobody_exits():
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy(tau=0.01))
    with pytest.raises(ValueError, match="^images: got"):
        model.tinydrop.features(torch.randn(1, 3, 31, 32))
    features, mask = model.tinydrop.features(varied_images(3))
    assert features.shape == (3, 32, 4, 4) and features.isfinite().all() and mask.any(2).any(1).all()
