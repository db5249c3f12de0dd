"""Tests of the options for the names of classes and the preprocessing, in every command that has them."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny_guidance, tiny_vit
from PIL import Image
from timm.models import save_for_hf

from tinydrop_kernels.cli import options
from tinydrop_kernels.cli.main import main
from tinydrop_kernels.cli.target import load_target
from tinydrop_kernels.predict.images import image_transform

NAMES = ["ant", "bee", "cat", "dog", "eel"]
OTHERS = ["fly", "gnu", "hen", "ibex", "jay"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a target, a guidance model, two images and files of class names."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("naming")
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "input_size": (3, 32, 32)}
    for name, model in (("target", tiny_vit()), ("guidance", tiny_guidance())):
        save_for_hf(model, folder / name, model_config={"label_names": NAMES}, data_config=config)
    (folder / "data" / "ibex").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / "ibex" / f"{number}.png")
    (folder / "others.txt").write_text("\r\n".join(OTHERS), encoding="utf-8-sig")  # as Windows writes it
    (folder / "four.txt").write_text("\n".join(OTHERS[:4]))
    (folder / "gap.txt").write_text("fly\n\nhen\nibex\njay\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("fly\ngnu\nhen\nib\xe9x\njay".encode("latin-1"))
    return folder


def run(folder, command, *arguments):
    models = ("--target", folder / "target", "--guidance", folder / "guidance")
    return CliRunner().invoke(main, [str(word) for word in (command, folder / "data", *models, *arguments)])


def test_every_command_names_the_classes(folder, tmp_path):
    given = ("--classes", folder / "others.txt")
    rows = [json.loads(line) for line in run(folder, "classify", *given).stdout.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert {candidate["name"] for candidate in row["top"]} == set(OTHERS)
        assert all(candidate["name"] == OTHERS[candidate["class"]] for candidate in row["top"])
    assert run(folder, "visualize", *given, "--out", tmp_path / "pictures").exit_code == 0
    page = (tmp_path / "pictures" / "index.html").read_text()
    assert rows[0]["top"][0]["name"] in page and not any(f'"{name}"' in page for name in NAMES)
    out = ("--out", tmp_path / "policy.json", "--cache", tmp_path / "cache")
    assert "judged by accuracy" in run(folder, "calibrate", *given, *out).output
    assert "judged by agreement" in run(folder, "calibrate", *out).output
    assert run(folder, "evaluate", *given).exit_code == 0
    assert "such as 'ibex'" in run(folder, "evaluate").output


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("four.txt", "classes: got 4 names, but the target's head has 5 classes"),
        ("gap.txt", "has no class name in line 2"),
        ("empty.txt", "has no class name in line 1"),
        ("latin.txt", "cannot be read as UTF-8"),
        ("none.txt", "does not exist"),
    ],
)
@pytest.mark.parametrize("command", ["classify", "calibrate"])
def test_names_that_do_not_fit(folder, command, file, message):
    result = run(folder, command, "--classes", folder / file)
    assert result.exit_code in (1, 2) and message in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_preprocessing_is_as_given(folder):
    """A white centre on a dark image: the centre crop keeps a known share of it, at known values."""
    pixels = np.full((64, 64, 3), 51, dtype=np.uint8)  # 0.2
    pixels[16:48, 16:48] = 255
    spec = str(folder / "target")
    own = image_transform(load_target(spec, None, None))(Image.fromarray(pixels))
    assert own[0, 0, 0].item() == pytest.approx((0.2 - 0.5) / 0.5)
    given = {"mean": (0.2, 0.3, 0.4), "std": (0.1, 0.2, 0.4), "crop_pct": 0.5, "interpolation": "nearest"}
    cropped = image_transform(load_target(spec, None, None, **given))(Image.fromarray(pixels))
    expected = torch.tensor([(1 - 0.2) / 0.1, (1 - 0.3) / 0.2, (1 - 0.4) / 0.4])
    torch.testing.assert_close(cropped, expected[:, None, None].expand(3, 32, 32))


def test_interpolation_is_as_given(folder):
    """Two colours stay two colours with nearest neighbours alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 2, (48, 48, 3), dtype=np.uint8) * 255)
    for name, few in ((None, False), ("nearest", True), ("bilinear", False)):
        model = load_target(str(folder / "target"), None, None, interpolation=name)
        assert (len(image_transform(model)(image).unique()) == 2) == few


@pytest.mark.parametrize("command", ["classify", "calibrate", "evaluate"])
def test_options_reach_the_patched_model(folder, monkeypatch, command):
    """``patch`` finds the normalisation in the model's ``pretrained_cfg``, where the options put it."""

    class Caught(Exception):
        pass

    def caught(model, *_, **__):
        raise Caught(model.pretrained_cfg)

    monkeypatch.setattr(options, "patch", caught)
    monkeypatch.setattr("tinydrop_kernels.cli.calibrate_command.gather", caught)
    given = ("--mean", 0.1, 0.2, 0.3, "--std", 1, 2, 3, "--crop-pct", 0.7, "--interpolation", "lanczos")
    (config,) = run(folder, command, *given, "--classes", folder / "others.txt").exception.args
    assert (config["mean"], config["std"]) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert (config["crop_pct"], config["interpolation"], config["label_names"]) == (0.7, "lanczos", OTHERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--std", 1, 0, 1), "std: got (1.0, 0.0, 1.0), expected 3 finite numbers above 0"),
        (("--mean", 1, "nan", 1), "mean: got (1.0, nan, 1.0), expected 3 finite numbers"),
        (("--crop-pct", 0), "0.0 is not in the range 0<x<=1"),
        (("--crop-pct", 1.5), "1.5 is not in the range 0<x<=1"),
        (("--interpolation", "random"), "'random' is not one of"),
    ],
)
def test_preprocessing_is_checked(folder, arguments, message):
    result = run(folder, "classify", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_a_checkpoint_for_other_images_gives_one_warning(folder):
    for given, message in (
        (("--img-size", 64), "is for image size 32 x 32, and the model runs with image size 64 x 64"),
        (("--mean", 0.1, 0.2, 0.3), "is for mean (0.5, 0.5, 0.5), and the model runs with mean (0.1, 0.2, 0.3)"),
        (("--std", 1, 1, 1), "is for std (0.5, 0.5, 0.5), and the model runs with std (1.0, 1.0, 1.0)"),
    ):
        result = run(folder, "classify", *given)
        assert result.exit_code == 0 and result.stderr.count("warning: ") == 1
        assert f"warning: target: {str(folder / 'target')!r} {message}; see" in result.stderr
        assert len(result.stdout.splitlines()) == 2  # rows alone
    assert "warning" not in run(folder, "classify", "--img-size", 32, "--mean", 0.5, 0.5, 0.5).stderr
