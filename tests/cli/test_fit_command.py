"""Tests of ``tinydrop fit-guidance`` as a user runs it, on checkpoints and images made here."""

import json
import shutil

import pytest
import timm
import torch
from click.testing import CliRunner
from folders import NAMES, save_images, save_model
from helpers import tiny_vit

from tinydrop_kernels.checkpoints import class_names, load_model
from tinydrop_kernels.cli import fit_command
from tinydrop_kernels.cli.main import main
from tinydrop_kernels.guidance import fitting


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a target, two backbones of other classes and images in class folders. One is unreadable."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fitting")
    models = {"target": tiny_vit(), "first": timm.create_model("test_byobnet", num_classes=3)}
    models["second"] = timm.create_model("test_resnet", num_classes=7)
    for name, model in models.items():
        save_model(model, folder / name, NAMES if name == "target" else None)
    save_images(folder / "data", [6] * 5)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fit(folder, *arguments):
    return run("fit-guidance", folder / "data", "--target", folder / "target", *arguments)


def test_the_folder_is_for_classify(folder, tmp_path):
    out = tmp_path / "new" / "guidance"
    result = fit(folder, "--guidance", folder / "first", "--no-labels", "--out", out)
    assert result.exit_code == 0, result.output
    assert "31 images; the guidance model learns from the target's answers alone" in result.output
    assert "broken.png" in result.output and "(3 images held out)" in result.output
    assert f"saved {folder / 'first'} in {out}" in result.output
    assert class_names(load_model(str(out))) == NAMES
    result = run("classify", folder / "data" / "bee", "--target", folder / "target", "--guidance", out, "--tau", 0.01)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 6 and all(row["exit"] for row in rows)


def test_the_best_of_several_is_saved(folder, tmp_path, monkeypatch):
    """The backbone that agrees most often with the target is saved. The agreements are set here."""

    def fit_each(*arguments):
        fitted = fitting.fit_each(*arguments)
        return [one._replace(agreement=agreement) for one, agreement in zip(fitted, (0.25, 0.75), strict=True)]

    monkeypatch.setattr(fit_command, "fit_each", fit_each)
    both = ("--guidance", folder / "first", "--guidance", folder / "second")
    result = fit(folder, *both, "--out", tmp_path / "guidance")
    assert result.exit_code == 0, result.output
    assert "learns from the target's answers and the folders' labels" in result.output
    lines = [line for line in result.output.splitlines() if "GFLOPs" in line]
    assert lines[0].startswith("   25.0%") and lines[0].endswith(str(folder / "first"))
    assert lines[1].startswith("   75.0%") and lines[1].endswith(str(folder / "second"))
    assert f"saved {folder / 'second'} in" in result.output
    assert type(load_model(str(tmp_path / "guidance"))).__name__ == "ResNet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--out'"),
        (("--out", "FOLDER/target"), "has files in it, expected a new or an empty folder"),
        (("--out", "FOLDER/target/config.json"), "is a file"),
        (("--out", "OUT", "--guidance", "no_such_model"), "guidance: got 'no_such_model'"),
        (("--out", "OUT", "--target", "no_such_model"), "target: got 'no_such_model'"),
        (("--out", "OUT", "--guidance", "FOLDER/first", "--device", "nonsense"), "device: got 'nonsense'"),
    ],
)
def test_mistakes_end_without_a_traceback(folder, tmp_path, arguments, message):
    before = sorted((folder / "target").iterdir())
    places = {"FOLDER": str(folder), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    result = fit(folder, *arguments)
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output
    assert sorted((folder / "target").iterdir()) == before


def test_too_few_images_are_refused(folder, tmp_path):
    shutil.copytree(folder / "data" / "bee", tmp_path / "data")
    given = ("--target", folder / "target", "--guidance", folder / "first", "--out", tmp_path / "out")
    result = run("fit-guidance", tmp_path / "data", *given)
    assert result.exit_code == 1 and "loader: got 6 images, expected at least 20" in result.output
