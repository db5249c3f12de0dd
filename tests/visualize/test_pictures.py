"""Tests of the pictures: each shows the kept patches at their positions."""

import numpy as np
import pytest
import torch
from fakes import fake_call
from helpers import tiny_guidance, tiny_vit, varied_images
from PIL import Image

import tinydrop_kernels as tdk
from tinydrop_kernels.visualize.pictures import (
    FRAME,
    as_pictures,
    kept_patches,
    on_own_grid,
    saliency,
    side_by_side,
)


def white(height=32, width=32):
    return np.full((height, width, 3), 255, dtype=np.uint8)


@pytest.fixture
def call():
    """Return a call with three images.

    The first keeps patches of the dense grid, the second of a coarser grid and gets a second look. The third exits.
    """
    return fake_call([[0, 5], [1], []], [(4, 4), (2, 2), (4, 4)], second_look=(1,))


def test_dropped_patches_are_dark(call):
    picture = np.asarray(kept_patches(white(), call, 0))[..., 0]
    kept = np.zeros((4, 4), dtype=bool)
    kept[0, 0] = kept[1, 1] = True
    assert np.array_equal(picture, np.where(kept.repeat(8, 0).repeat(8, 1), 255, 38))


def test_each_image_has_its_own_grid(call):
    picture = np.asarray(kept_patches(Image.fromarray(white(60, 40)), call, 1))[..., 0]
    assert (picture[:30, 20:] == 255).all()
    assert (picture[30:] == 38).all() and (picture[:, :20] == 38).all()


def test_exits_are_framed(call):
    picture = np.asarray(kept_patches(white(), call, 2))
    assert tuple(picture[0, 0]) == tuple(picture[-1, -1]) == FRAME
    assert (picture[2:-2, 2:-2] == 255).all()


def test_images_are_left_as_they_are(call):
    image = Image.fromarray(white())
    for draw in (kept_patches, saliency, on_own_grid):
        for index in range(3):
            draw(image, call, index)
    assert np.array_equal(np.asarray(image), white())


def test_own_grid_is_as_coarse_as_it_was(call):
    """A picture of a coarser grid lacks the detail that the target did not see, and lines separate its patches."""
    image = np.full((32, 32, 3), 100, dtype=np.uint8)
    image[:, 18] = 200  # a line of one pixel
    fine, coarse = (np.asarray(on_own_grid(image, call, index)).astype(int)[..., 0] for index in (0, 1))
    assert (fine[9:16, 9:16] == 100).all() and (fine[8, 9:16] > 120).all() and (fine[9:16, 8] > 120).all()
    assert fine[1, 20] == 15 and fine[1, 18] == 30  # dropped patches, with a sharp line on the dense grid
    blurred = coarse[1:15, 18:20]
    assert (100 < blurred).all() and (blurred < 180).all() and len(np.unique(blurred)) == 1
    assert (np.delete(coarse[16] > coarse[17], 16)).all()  # without column 16, where the lines cross


def test_own_grid_of_an_exit_is_framed(call):
    assert np.array_equal(np.asarray(on_own_grid(white(), call, 2)), np.asarray(kept_patches(white(), call, 2)))


def test_side_by_side():
    pictures = [Image.new("RGB", (10, 6), colour) for colour in ("red", "black")]
    page = side_by_side(pictures)
    assert page.size == (28, 6)
    assert [page.getpixel((x, 5)) for x in (9, 10, 18)] == [(255, 0, 0), (255, 255, 255), (0, 0, 0)]


def test_grey_images_are_taken(call):
    grey = np.full((32, 32), 100, dtype=np.uint8)
    assert kept_patches(grey, call, 0).getpixel((0, 0)) == (100, 100, 100)


def test_salient_places_are_red(call):
    picture = np.asarray(saliency(white(), call, 0)).astype(int)
    redness = picture[..., 0] - picture[..., 2]
    assert redness[0, 0] == 0 and redness[-1, -1] == 255
    assert redness[-1, 0] > redness[0, -1]


@pytest.mark.parametrize("value", [0.0, 3.0, float("nan")])
def test_flat_saliency_is_no_error(call, value):
    call.saliency[0].fill_(value)
    assert np.array_equal(np.asarray(saliency(white(), call, 0)), white())


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_what_went_in(channels):
    model = tiny_vit(in_chans=channels)
    model.pretrained_cfg |= {"mean": (0.2, 0.5, 0.8), "std": (0.5, 0.25, 0.5)}
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    if channels == 1:
        mean, std = mean.mean(1, keepdim=True), std.mean(1, keepdim=True)
    pixels = torch.randint(0, 256, (2, channels, 32, 32))
    for picture, expected in zip(as_pictures(model, (pixels / 255 - mean) / std), pixels, strict=True):
        assert np.array_equal(np.asarray(picture), expected.permute(1, 2, 0).expand(32, 32, 3))


def test_a_real_call_can_be_drawn():
    model = tdk.patch(tiny_vit(), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    images = varied_images(3)
    with torch.inference_mode():
        model(images)
    pictures = as_pictures(model, images)
    bright = np.asarray(kept_patches(white(), model.tinydrop.last, 0))[..., 0] == 255
    assert bright.mean() == 0.5
    assert saliency(pictures[0], model.tinydrop.last, 0).size == (32, 32)
