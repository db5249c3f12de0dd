"""Tests of ``tinydrop evaluate`` as a user runs it, on checkpoints and images made here."""

import csv
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from folders import save_images, save_model
from helpers import tiny_guidance, tiny_vit
from PIL import Image

from tinydrop_kernels.cli import evaluate_command
from tinydrop_kernels.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a target, a guidance model and images in class folders. One image is unreadable."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluating")
    for name, model in (("target", tiny_vit()), ("guidance", tiny_guidance())):
        save_model(model, folder / name)
    save_images(folder / "data", range(2, 7), side=4, size=(40, 48))  # as many images of no two classes
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def evaluate(folder, *arguments, data="data"):
    models = ("--target", folder / "target", "--guidance", folder / "guidance", "--tau", 0.37)
    return run("evaluate", folder / data, *models, *arguments)


def rows_of(folder, out, *arguments):
    result = evaluate(folder, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())


def test_accuracy_is_that_of_the_rows_of_classify(folder, tmp_path):
    """An unreadable image precedes others, whose labels by position among the readable images would be wrong."""
    dense, patched, guidance = rows_of(folder, tmp_path / "out.json", "--batch-size", 4)
    models = ("--target", folder / "target", "--guidance", folder / "guidance", "--tau", 0.37)
    result = run("classify", folder / "data", *models, "--compare-dense")
    rows = [row for row in map(json.loads, result.stdout.splitlines()) if "error" not in row]
    assert len(rows) == 20

    def percent(name_of):
        return pytest.approx(100 * np.mean([name_of(row) == row["path"].split("/")[-2] for row in rows]))

    assert patched["top1"] == percent(lambda row: row["top"][0]["name"])
    assert dense["top1"] == percent(lambda row: row["dense"]["name"])
    assert guidance["top1"] == percent(lambda row: row["guidance"]["name"])
    assert len({dense["top1"], patched["top1"], guidance["top1"]}) > 1
    exits = 100 * np.mean([row["exit"] for row in rows])
    assert patched["exits"] == pytest.approx(exits) and 0 < exits < 100
    same = np.mean([row["top"][0]["name"] == row["dense"]["name"] for row in rows])
    assert patched["agreement"] == pytest.approx(100 * same)


def test_what_is_printed(folder):
    result = evaluate(folder, "--batch-size", 16, "--stages")
    assert result.exit_code == 0, result.output
    assert "images 20, unreadable 1 (cpu, float32, batches of 16, models only)" in result.stdout
    for line in ("dense  ", "patched  ", "guidance alone", "Patched is", "ms per image guidance", "note: "):
        assert f"\n{line}" in result.stdout
    assert "broken.png" in result.stderr


def test_both_kinds_of_files_hold_the_same_rows(folder, tmp_path):
    rows = rows_of(folder, tmp_path / "out.json")
    assert evaluate(folder, "--out", tmp_path / "out.csv").exit_code == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 3 and list(read[0]) == list(rows[0])
    timed = {"images_per_second"}  # differs from run to run
    for row, other in zip(rows, read, strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items() if name not in timed} == {
            name: value for name, value in other.items() if name not in timed
        }
    assert read[2]["images_per_second"] == "" and float(read[1]["images_per_second"]) > 0


def test_names_come_from_the_file_of_classes(folder, tmp_path):
    """Other names make other labels. The dense model's accuracy is counted again from the rows of classify."""
    names = ["eel", "ant", "dog", "bee", "cat"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    renamed, *_ = rows_of(folder, tmp_path / "out.json", "--classes", tmp_path / "names.txt")
    models = ("--target", folder / "target", "--guidance", folder / "guidance", "--classes", tmp_path / "names.txt")
    result = run("classify", folder / "data", *models, "--compare-dense")
    rows = [row for row in map(json.loads, result.stdout.splitlines()) if "error" not in row]
    assert all(row["dense"]["name"] == names[row["dense"]["class"]] for row in rows)
    right = np.mean([row["dense"]["name"] == row["path"].split("/")[-2] for row in rows])
    assert renamed["top1"] == pytest.approx(100 * right)
    own, *_ = rows_of(folder, tmp_path / "own.json")
    assert own["top1"] != renamed["top1"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["ant", "bee", "wasp"], "got 3 folders, such as 'wasp', and the target has 5 classes, such as 'ant'"),
        (["ant", "bee", "cat", "dog", "wasp"], "got 5 folders, such as 'wasp', and the target has 5 classes"),
        (["."], "data: 1 images are in no class folder, such as '0.png'"),
    ],
)
def test_folders_that_do_not_fit_the_classes(folder, tmp_path, folders, message):
    for name in folders:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / "0.png")
    result = evaluate(folder, data=tmp_path / "data")
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert ("--classes FILE" in result.output) == ("such as 'ant'" in result.output or "wasp" in result.output)


def test_a_name_of_two_classes(folder, tmp_path):
    """A folder whose name is that of two classes has no certain label."""
    (tmp_path / "names.txt").write_text("ant\nbee\nant\ndog\neel\n")
    result = evaluate(folder, "--classes", tmp_path / "names.txt")
    assert result.exit_code == 1 and "such as 'ant'" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "results.txt"), "out: got 'results.txt', expected a name that ends in .csv or .json"),
        (("--out", "no/such/folder/results.csv"), "cannot be written: there is no such folder"),
    ],
)
def test_outputs_are_checked_before_the_models_are_loaded(folder, monkeypatch, arguments, message):
    monkeypatch.setattr(evaluate_command, "make_patched", lambda *_, **__: pytest.fail("models were loaded"))
    result = evaluate(folder, *arguments)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


def test_other_mistakes_are_one_clear_line(folder):
    models = ("--target", folder / "target", "--guidance", folder / "guidance")
    result = run("evaluate", folder / "data", *models, "--multi-label")
    assert result.exit_code == 1 and "Error: model: it is multi-label, expected a model with one" in result.output
    result = evaluate(folder, "--policy", folder / "target" / "config.json")
    assert result.exit_code == 1 and "--tau: has no effect together with --policy" in result.output


def interrupt(*_, **__):
    raise KeyboardInterrupt


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("failing", "code", "message"), [(interrupt, 130, "interrupted"), (out_of_memory, 1, "A smaller --batch-size")]
)
def test_an_earlier_file_is_kept(folder, tmp_path, monkeypatch, failing, code, message):
    monkeypatch.setattr(evaluate_command, "evaluate_model", failing)
    (tmp_path / "out.csv").write_text("earlier")
    result = evaluate(folder, "--out", tmp_path / "out.csv")
    assert result.exit_code == code and message in result.output and "Traceback" not in result.output
    assert (tmp_path / "out.csv").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1
