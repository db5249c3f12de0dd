"""Tests of ``tinydrop calibrate`` as a user runs it, on checkpoints and images made here."""

import json

import pytest
import torch
from click.testing import CliRunner
from folders import save_images, save_model
from helpers import tiny_guidance, tiny_vit

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import class_names, load_model
from tinydrop_kernels.cli import calibrate_command as calibrating
from tinydrop_kernels.cli.main import main
from tinydrop_kernels.predict.loading import folder_labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a target, two guidance models and images in class folders. One image is unreadable."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("calibrating")
    for name, model in (("target", tiny_vit()), ("first", tiny_guidance()), ("second", tiny_guidance())):
        save_model(model, folder / name)
    save_images(folder / "data", [6] * 5)
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def calibrate(folder, *arguments):
    models = ("--model", folder / "target", "--cache", folder / "cache")
    return run("calibrate", folder / "data", *models, *arguments)


def test_several_drops_and_guidance_models(folder, tmp_path):
    out, picture = tmp_path / "policy.json", tmp_path / "frontier.csv"
    given = (
        "--guidance",
        folder / "first",
        "--guidance",
        folder / "second",
        "--accuracy-drop",
        20,
        "--accuracy-drop",
        50.5,
    )
    result = calibrate(folder, *given, "--out", out, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert "31 images, judged by accuracy" in result.output and "broken.png" in result.output
    assert result.output.count("best policy of each guidance model") == 2
    assert str(folder / "first") in result.output and str(folder / "second") in result.output
    for drop in ("20", "50.5"):
        policy = tdk.CalibratedPolicy.load(tmp_path / f"policy-{drop}.json")
        assert policy.certificate.accuracy_drop == float(drop) / 100 and policy.certificate.confidence == 0.95
        assert policy.images["count"] == 30 and policy.images["labelled"]
        assert str(policy) in result.output
    for number in (1, 2):
        assert (tmp_path / f"frontier-{number}.csv").read_text().startswith("way,by,cost")


def test_the_file_is_for_classify(folder, tmp_path):
    out = tmp_path / "policy.json"
    assert calibrate(folder, "--guidance", folder / "first", "--accuracy-drop", 20, "--out", out).exit_code == 0
    given = ("classify", folder / "data" / "bee", "--model", folder / "target", "--policy", out)
    result = run(*given, "--guidance", folder / "first")
    assert result.exit_code == 0 and len([json.loads(line) for line in result.stdout.splitlines()]) == 6
    result = run(*given, "--guidance", folder / "second")
    assert result.exit_code == 1 and "calibrated for the guidance" in result.output
    result = run(*given, "--guidance", folder / "first", "--tau", 0.5)
    assert result.exit_code == 1 and "--tau: has no effect together with --policy" in result.output


def test_without_labels(folder, tmp_path):
    given = ("--guidance", folder / "first", "--out", tmp_path / "policy.json")
    result = calibrate(folder, *given, "--no-labels")
    assert result.exit_code == 0 and "agreement with the dense model, which bounds" in result.output
    assert not tdk.CalibratedPolicy.load(tmp_path / "policy.json").certificate.labelled


def test_labels_are_found_by_name_or_by_place(folder, tmp_path):
    model = load_model(str(folder / "target"))
    for names, expected in (
        (["bee", "eel"], [1, 4]),
        (list("vwxyz"), [0, 1, 2, 3, 4]),
        (["bee", "other"], None),
        (["wasp", "yak"], None),
        (["ant", "bee", "cat", "dog", "other"], None),
        ([""], None),
    ):
        files = [tmp_path / name / "image.png" for name in names]
        assert folder_labels(tmp_path, files, class_names(model)) == expected
    files = [tmp_path / name / "image.png" for name in ("bee", "cat")]
    assert folder_labels(tmp_path, files, ["bee", "cat", "bee"]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--accuracy-drop", "0"), "0"),
        (("--confidence", "1"), "1"),
        (("--guidance", "no_such_model"), "guidance: got 'no_such_model'"),
        (("--device", "nonsense"), "device: got 'nonsense'"),
        (("--out", "no/such/folder/policy.json"), "out: 'no/such/folder/policy.json' cannot be written"),
        (("--picture", "frontier.doc"), "picture: got 'frontier.doc', expected a name that ends in"),
    ],
)
def test_mistakes_end_without_a_traceback(folder, arguments, message):
    result = calibrate(folder, *arguments)
    assert result.exit_code in (1, 2) and message in result.output and "Traceback" not in result.output


def test_interrupted(folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "gather", interrupt)
    result = calibrate(folder, "--guidance", folder / "first")
    assert result.exit_code == 130 and "run the same command again" in result.output
