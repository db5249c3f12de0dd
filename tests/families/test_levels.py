"""Tests of batches with several grids, compared image by image with timm at each grid's size.

The expected logits come from the model after timm's ``set_input_size``, on the image resized to ``grid x patch``, with
the dropped keys masked.
"""

import copy

import pytest
import torch
from helpers import close, masked_features, spread_confidence, tiny_guidance, tiny_vit, varied_images
from slow import mostly_slow
from zoo import MODELS, QUICK, make

import tinydrop_kernels as tdk
from tinydrop_kernels.families import family_of

HYBRIDS = ("stem without projection", "convolutional stem", "dynamic size and pad", "aimv2")
GRIDS_OF = {"dinov2 at 518": (37, 37)}


def at_size(model, size):
    """Return a copy of the model for another image size, made by timm's ``set_input_size``."""
    other = copy.deepcopy(model)
    other.set_input_size(img_size=size)
    return other


def masked_at_its_grid(model, image, grid, kept):
    """Return timm's logits of one image at its own grid, with all patches masked except ``kept``."""
    height, width = model.patch_embed.proj.weight.shape[-2:]
    rows, columns = family_of(model).grid_size(model, image)
    size = (grid[0] * height, grid[1] * width)
    if grid != (rows, columns):
        whole = image[..., : rows * height, : columns * width]
        image = torch.nn.functional.interpolate(whole, size=size, mode="bicubic", antialias=True)
        model = at_size(model, size)
    prefix = model.num_prefix_tokens
    seen = torch.zeros(prefix + grid[0] * grid[1], dtype=torch.bool)
    seen[:prefix] = True
    seen[prefix + kept.long()] = True
    return model.forward_head(masked_features(model, image, seen)[:, seen])


@pytest.mark.parametrize("coarsen", [0.5, 1.0])
@pytest.mark.parametrize("key", mostly_slow([key for key in MODELS if key not in HYBRIDS], *QUICK))
def test_mixed_levels_are_timm_at_those_sizes(key, coarsen):
    model, images = make(key)
    images = images[:2] if key == "dinov2 at 518" else torch.cat([images, images.flip(0) * 2])
    guidance = tiny_guidance(sharpness=60.0)
    tdk.patch(model, guidance, tdk.DropPolicy(None, 1.0, 0.15, coarsen, blend=0.0, second_look=None))
    # Spread the images over all budgets; the random guidance model alone would give them similar ones.
    model.tinydrop.guidance.register_forward_hook(spread_confidence)
    with torch.inference_mode():
        out = model(images)
        last = model.tinydrop.last
        kept, grids = last.kept, last.grid_sizes
        assert len(set(grids)) > 1, "several grids in one batch, or nothing is tested"
        if coarsen == 1:
            assert all(len(k) == rows * columns for k, (rows, columns) in zip(kept, grids, strict=True))
        tdk.unpatch(model)
        for b, (patches, grid) in enumerate(zip(kept, grids, strict=True)):
            close(out[b : b + 1], masked_at_its_grid(model, images[b : b + 1], grid, patches))


@pytest.mark.parametrize("key", HYBRIDS)
def test_stems_that_have_one_grid_keep_it_and_say_so(key):
    model, images = make(key)
    with pytest.warns(UserWarning, match="keeps its dense grid"):
        tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
    with torch.inference_mode():
        model(images)
    assert set(model.tinydrop.last.grid_sizes) == {family_of(model).grid_size(model, images)}


def test_small_grids_have_no_level_twice():
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=1.0))
    assert model.tinydrop.levels((4, 4)) == [(4, 4), (3, 3), (2, 2)]
    assert model.tinydrop.levels((14, 14)) == [(14, 14), (12, 12), (11, 11), (9, 9), (7, 7)]
    assert model.tinydrop.levels((1, 1)) == [(1, 1)]


def test_positions_follow_the_weights():
    """Check that resampled positions are kept between calls and recomputed when the weights change."""
    model, images = tiny_vit(img_size=64), varied_images(3, 64)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=1.0))
    with torch.no_grad():
        before = model(images)
        assert torch.equal(model(images), before)
        model.pos_embed.mul_(3.0)
        changed = model(images)
        assert not torch.equal(changed, before)
        model.pos_embed.div_(3.0)
        torch.testing.assert_close(model(images), before)
        model.pos_embed.data = 3.0 * model.pos_embed.data
        torch.testing.assert_close(model(images), changed)
        assert model.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_positions_of_a_coarser_grid():
    model, images = tiny_vit(img_size=64), varied_images(3, 64)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=1.0))
    model(images).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0
    assert model.tinydrop.last.grid_sizes == [(4, 4)] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    model, images = tiny_vit(img_size=64), varied_images(6, 64)
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.3, coarsen=0.5))
    with torch.inference_mode():
        wanted, kept = model(images), model.tinydrop.last.selection.indices
        out = model.to(dtype)(images.to(dtype))
        same = (model.tinydrop.last.selection.indices == kept).all(dim=1)
    assert same.any()
    torch.testing.assert_close(out[same].float(), wanted[same], atol=5e-2, rtol=5e-2)
