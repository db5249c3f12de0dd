"""Tests of image loading and of the search for image files."""

import io
import os

import numpy as np
import pytest
from helpers import tiny_vit
from PIL import Image

from tinydrop_kernels.predict.images import image_files, image_transform, load_image


def reopened(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_photographs_are_upright():
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers must rotate the image clockwise
    image = load_image(reopened(Image.fromarray(pixels), "png", exif=exif))
    assert image.size == (8, 16)
    assert np.asarray(image)[:4].min() == 255 and np.asarray(image)[4:].max() == 0


@pytest.mark.parametrize("format", ["png", "tiff"])
def test_16_bit_images_are_scaled(format):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    file = reopened(Image.fromarray(ramp), format)
    expected = np.arange(256).reshape(16, 16)
    assert np.abs(np.asarray(load_image(file, 1)).astype(int) - expected).max() <= 1
    assert np.array_equal(np.asarray(load_image(file))[..., 2], np.asarray(load_image(file, 1)))


def test_32_bit_integers_are_taken_as_16_bits():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.int32))
    assert image.mode == "I" and np.asarray(load_image(image, 1)).tolist() == [[0, 128, 255]]
    with pytest.raises(ValueError, match="int32 pixels from 0 to 65536, expected 0 to 65535"):
        load_image(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)))


def test_floating_point_images_are_scaled_from_0_to_1():
    file = reopened(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), "tiff")
    assert np.asarray(load_image(file, 1)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_other_floating_point_images_are_refused(value):
    pixels = np.array([[0.2, value]], dtype=np.float32)
    for source in (pixels, Image.fromarray(pixels), reopened(Image.fromarray(pixels), "tiff")):
        with pytest.raises(ValueError, match="image: got float32 pixels from .*, expected 0 to 1"):
            load_image(source)


def test_modes():
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        assert load_image(Image.new(mode, (4, 3))).mode == "RGB"
        assert load_image(Image.new(mode, (4, 3)), 1).mode == "L"
    half = Image.new("RGBA", (1, 1), (200, 100, 50, 128))
    assert load_image(reopened(half, "png")).getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 4), np.uint8), r"got shape \(2, 2, 4\), expected \(height, width\)"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"got shape \(1, 2, 2, 3\)"),
        (np.zeros((0, 2, 3), np.uint8), "got no pixels"),
        (np.zeros((2, 2), np.int64), "got pixels of int64, expected uint8"),
        (np.zeros((2, 2), bool), "got pixels of bool"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ValueError, match=f"image: {message}"):
        load_image(array)


def test_transform_has_the_size_and_channels_of_the_model():
    model = tiny_vit()
    assert image_transform(model)(Image.new("RGB", (90, 50))).shape == (3, 32, 32)
    model.set_input_size(48)
    assert image_transform(model)(Image.new("RGB", (90, 50))).shape == (3, 48, 48)
    model = tiny_vit(in_chans=1)
    model.pretrained_cfg |= {"mean": (0.2, 0.5, 0.8), "std": (0.5,) * 3}
    grey = image_transform(model)(Image.new("L", (32, 32), 255))
    assert grey.shape == (1, 32, 32) and grey.allclose(grey.new_tensor(1.0))


def found_below(folder):
    skipped = []
    found = image_files([folder], lambda path, reason: skipped.append((path.relative_to(folder), reason)))
    return [str(path.relative_to(folder)) for path in found], [(str(path), reason) for path, reason in skipped]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_files_are_found_by_endings_that_pillow_opens(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpeg", "notes.txt", "paper.pdf", "sub/c.webp")
    assert found_below(tmp_path) == (["a.jpeg", "b.PNG", "sub/c.webp"], [])
    paper = tmp_path / "paper.pdf"
    assert image_files([paper], lambda *_: None) == [paper]  # a file given by name is returned with any ending


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found, skipped = found_below(tmp_path)
    assert found == ["sub/a.png"]
    assert skipped == [("gone.png", "not a regular file"), ("sub/back", f"the same folder as {tmp_path}")]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "sub" / "back").unlink()
    assert found_below(tmp_path / "elsewhere") == (["linked/a.png"], [])


def test_folders_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert found_below(tmp_path) == (["a.png"], [("locked", "Permission denied")])
