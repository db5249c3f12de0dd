"""Tests of the command line as a user runs it, on checkpoints and images made here."""

import json
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import fake_report
from helpers import tiny_guidance, tiny_vit
from PIL import Image
from timm.models import save_for_hf

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import load_model
from tinydrop_kernels.cli import commands as cli
from tinydrop_kernels.cli import options
from tinydrop_kernels.cli.main import COMMANDS, main
from tinydrop_kernels.ops import registry
from tinydrop_kernels.policy.fingerprint import fingerprint_of
from tinydrop_kernels.predict.predictor import Predictor

NAMES = ["ant", "bee", "cat", "dog", "eel"]
FILES = ["a.jpg", "b.png", "broken.jpg", "e.webp", "c.bmp", "d.gif", "text.png"]  # in the order of the rows


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a folder with a target and a guidance model as ``timm.models.save_for_hf`` writes them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    data_config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    for name, model, size in (("target", tiny_vit(), 32), ("guidance", tiny_guidance(), 64)):
        save_for_hf(
            model,
            folder / name,
            model_config={"label_names": NAMES},
            data_config=data_config | {"input_size": (3, size, size)},
            safe_serialization=True,
        )
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of images in several formats, modes and sizes, with two unreadable ones."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)

    def pixels(*shape):
        return rng.integers(0, 256, shape, dtype=np.uint8)

    Image.fromarray(pixels(50, 70, 3)).save(folder / "a.jpg")
    Image.fromarray(pixels(32, 32, 4)).save(folder / "b.png")
    Image.fromarray(pixels(90, 40)).save(folder / "more" / "c.bmp")
    Image.fromarray(pixels(33, 47, 3)).convert("P").save(folder / "more" / "d.gif")
    Image.fromarray(pixels(64, 64, 3)).save(folder / "e.webp")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("ignored")
    return folder


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def classify(checkpoints, *arguments):
    models = ("--model", checkpoints / "target", "--guidance", checkpoints / "guidance")
    return run("classify", *models, *arguments)


def test_classify(checkpoints, photos, tmp_path):
    out = tmp_path / "results.jsonl"
    result = classify(
        checkpoints, photos, "--out", out, "--batch-size", 2, "--keep-ratio", 0.5, "--tau", "none", "--compare-dense"
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["path"].rsplit("/", 1)[1] for row in rows] == FILES
    unreadable = [row for row in rows if "error" in row]
    assert [sorted(row) for row in unreadable] == [["error", "path"]] * 2 and "text.png" in unreadable[1]["error"]
    for row in (row for row in rows if row not in unreadable):
        assert row["kept"] == 8 and row["of"] == 16 and not row["exit"]
        assert sorted(entry["name"] for entry in row["top"]) == NAMES
        assert sum(entry["probability"] for entry in row["top"]) == pytest.approx(1, abs=1e-3)
        assert row["dense"]["name"] in NAMES
    assert "images       5, unreadable 2" in result.output
    for line in ("exits        0", "mean keep    50.0%", "FLOPs saved", "images/s", "speed-up", "agreement"):
        assert line in result.output
    assert "skipped" in result.output and "broken.jpg" in result.output and "text.png" in result.output


def test_answers_are_those_of_the_api(checkpoints, photos):
    result = classify(checkpoints, photos / "a.jpg", "--tau", 0.9)
    row = json.loads(result.stdout.splitlines()[0])
    model = tdk.patch(load_model(str(checkpoints / "target")), str(checkpoints / "guidance"), tdk.DropPolicy(tau=0.9))
    image = Image.open(photos / "a.jpg").resize((45, 32), Image.Resampling.BICUBIC)
    image = image.crop((6, 0, 38, 32))
    tensor = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    with torch.inference_mode():
        probability = model(tensor).softmax(1)[0]
    told = {entry["name"]: entry["probability"] for entry in row["top"]}
    assert told == pytest.approx(dict(zip(NAMES, probability.tolist(), strict=True)), abs=0.02)


def test_exits_are_told(checkpoints, photos):
    result = classify(checkpoints, photos / "a.jpg", "--tau", 0.01)
    row = json.loads(result.stdout.splitlines()[0])
    assert row["exit"] and row["kept"] == 0
    assert "exits        1 (100.0%)" in result.output and "all images exited" in result.output


def test_half_precision(checkpoints, photos):
    assert classify(checkpoints, photos / "a.jpg", "--dtype", "bfloat16").exit_code == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_automatic_precision(checkpoints, photos, monkeypatch, dtype):
    monkeypatch.setattr(options, "fast_dtype", lambda device: dtype)
    result = classify(checkpoints, photos / "a.jpg", "--dtype", "auto")
    assert result.exit_code == 0 and f"cpu, {dtype}, batches of".replace("torch.", "") in result.output


def test_guidance_size_and_compile(checkpoints, photos, monkeypatch):
    asked = []
    patch = options.patch
    monkeypatch.setattr(
        options, "patch", lambda *arguments, compile, **named: asked.append(compile) or patch(*arguments, **named)
    )
    told = [
        next(line for line in classify(checkpoints, photos / "a.jpg", *extra).output.splitlines() if "saved" in line)
        for extra in ((), ("--guidance-size", 16, "--compile"), ("--guidance-size", "16x64"))
    ]
    assert len(set(told)) == 3 and asked == [False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, "ACTIVE"], ids=["by default", "as the user says"])
def test_waiting_threads_sleep(given):
    """OMP_WAIT_POLICY is PASSIVE unless the user sets it. Tested in another process, because OpenMP reads it once."""
    program = "import os, sys; from tinydrop_kernels.__main__ import main; sys.argv = ['tinydrop', '--version']\n"
    program += "assert 'torch' not in sys.modules\ntry:\n    main()\nfinally:\n    print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1] == (given or "PASSIVE"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/file.jpg"], "does not exist"),
        (["PHOTOS/more", "--guidance-size", "small"], "neither a number nor HEIGHTxWIDTH"),
        (["PHOTOS/more", "--guidance-size", "0"], "input_size: got (0, 0)"),
        (["PHOTOS/text.png"], "no image could be read"),
        (["PHOTOS/more", "--tau", "1.5"], "tau: got 1.5"),
        (["PHOTOS/more", "--tau", "high"], "neither a number nor 'none'"),
        (["PHOTOS/more", "--gamma", "-1"], "gamma: got -1.0"),
        (["PHOTOS/more", "--min-keep", "0"], "min_keep: got 0.0"),
        (["PHOTOS/more", "--keep-ratio", "2"], "keep_ratio: got 2.0"),
        (["PHOTOS/more", "--model", "resnet18.a1_in1k"], "could not be loaded"),
        (["PHOTOS/more", "--model", "vit_bas_patch16_224"], "near to it: vit_base_patch16_224"),
        (["PHOTOS/more", "--model", "test_vit=/no/such/file"], "there is no file"),
        (["PHOTOS/more", "--model", "PHOTOS/a.jpg"], "there is no config.json"),
        (["PHOTOS/more", "--guidance", "resnet17"], "guidance: got 'resnet17'"),
        (["PHOTOS/more", "--device", "toaster"], "device: got 'toaster'"),
        (["PHOTOS/more", "--device", "cuda:99"], "device: got 'cuda:99'"),
        (["PHOTOS/more", "--out", "/no/such/folder/results.jsonl"], "cannot be written: No such file or directory"),
        (["PHOTOS/more", "--out", "rows.json"], "expected a name that ends in .jsonl, .ndjson, .csv, .parquet, or"),
        (["PHOTOS/more", "--out", "/dev/null", "--format", "jsonl"], "'/dev/null' is not a regular file"),
        (["PHOTOS/more", "--format", "csv"], "--format: has no effect without --out"),
        (["PHOTOS/more", "--resume"], "--resume: has no effect without --out"),
        (["PHOTOS/more", "--top", "0"], "0 is not in the range"),
    ],
)
def test_mistakes_are_one_clear_line(checkpoints, photos, arguments, message):
    result = classify(checkpoints, *[a.replace("PHOTOS", str(photos)) for a in arguments])
    assert result.exit_code != 0 and message in result.output
    assert "Traceback" not in result.output


def test_folder_without_images(checkpoints, tmp_path):
    result = classify(checkpoints, tmp_path)
    assert result.exit_code != 0 and "no image in" in result.output


def test_info_tells_every_operator():
    result = run("info")
    assert result.exit_code == 0
    for name in ("torch", "timm", "device", *tdk.ops.OPERATORS):
        assert f"\n{name} " in result.output
    assert f"torch                 {torch.__version__}".split("+")[0] in result.output
    assert "\ntriton " in result.output and "\nCUDA C++ extension " in result.output


@pytest.fixture
def environment(monkeypatch):
    """Return a monkeypatch for environment variables that the package otherwise reads only once."""
    registry._forced_by_environment.cache_clear()
    yield monkeypatch
    registry._forced_by_environment.cache_clear()


def test_info_says_what_is_wrong(environment):
    environment.setenv("TINYDROP_BACKEND", "abacus")
    result = run("info")
    assert result.exit_code == 1 and "TINYDROP_BACKEND: got 'abacus'" in result.output


def test_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m tinydrop_kernels", "--version"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("tinydrop_kernels", run_name="__main__")
    assert not left.value.code
    assert capsys.readouterr().out == f"tinydrop, version {tdk.__version__}\n"


def test_a_forced_backend_that_cannot_run_is_one_clear_line(checkpoints, photos, environment):
    environment.setenv("TINYDROP_BACKEND", "triton")
    environment.setenv("TRITON_INTERPRET", "0")
    result = classify(checkpoints, photos)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.output.splitlines()[-1].startswith("Error: ") and "triton" in result.output


def save(model, folder, channels=3, size=32):
    config = {"num_classes": model.num_classes, "input_size": (channels, size, size)}
    options = {"in_chans": channels, "num_classes": model.num_classes}
    save_for_hf(model, folder, model_config=config, model_args=options, safe_serialization=True)
    return folder


def test_models_of_one_channel(photos, tmp_path):
    target = save(tiny_vit(in_chans=1), tmp_path / "target", 1)
    guidance = save(tiny_guidance(in_chans=1), tmp_path / "guidance", 1, 64)
    result = run("classify", photos / "a.jpg", "--model", target, "--guidance", guidance)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[0])["of"] == 16


def test_models_of_one_channel_need_such_guidance(checkpoints, photos, tmp_path):
    target = save(tiny_vit(in_chans=1), tmp_path / "target", 1)
    result = run("classify", photos / "a.jpg", "--model", target, "--guidance", checkpoints / "guidance")
    assert result.exit_code == 1 and "Error: guidance: " in result.output and "Traceback" not in result.output


def test_models_without_classes(checkpoints, photos, tmp_path):
    target = save(tiny_vit(num_classes=0), tmp_path / "target")
    result = run("classify", photos, "--model", target, "--guidance", checkpoints / "guidance")
    assert result.exit_code == 1 and "model: got one without classes" in result.output


def test_keep_ratio_is_instead_of_the_law(checkpoints, photos):
    for option in ("--gamma", "--min-keep"):
        result = classify(checkpoints, photos / "a.jpg", "--keep-ratio", 0.5, option, 0.5)
        assert result.exit_code == 1 and f"{option}: has no effect together with --keep-ratio" in result.output
    result = classify(checkpoints, photos / "a.jpg", "--keep-ratio", 0.5, "--tau", 0.01)
    assert json.loads(result.stdout.splitlines()[0])["exit"]


@pytest.fixture
def chosen(monkeypatch, checkpoints, photos):
    """Return a function from command-line options to the policy that ``classify`` builds."""

    class Chosen(Exception):
        pass

    def caught(model, guidance, policy, **others):
        raise Chosen(policy)

    monkeypatch.setattr(options, "patch", caught)
    return lambda *given: classify(checkpoints, photos / "a.jpg", *given).exception.args[0]


def test_options_make_the_policy(chosen):
    assert chosen() == tdk.DropPolicy()
    given = ("--coarsen", 0.75, "--blend", 0.2, "--second-look", 0.3, 0.7, "--min-keep", 0.4, "--gamma", 2)
    given += ("--saliency", 5, 0.5, 0)
    law = {"coarsen": 0.75, "blend": 0.2, "second_look": (0.3, 0.7), "saliency": tdk.ops.Saliency(5, 0.5, 0.0)}
    assert chosen(*given) == tdk.DropPolicy(gamma=2.0, min_keep=0.4, **law)
    fixed = tdk.DropPolicy.fixed(0.5, tau=tdk.DropPolicy.tau)
    assert chosen("--keep-ratio", 0.5) == fixed
    assert chosen("--keep-ratio", 0.5, "--tau", "none", "--blend", 0.2) == replace(fixed, tau=None, blend=0.2)
    assert chosen("--second-look", 0, 0) == tdk.DropPolicy(second_look=None)
    assert chosen("--multi-label", "--gamma", 3) == tdk.DropPolicy(None, 3.0, blend=0.0, second_look=None)
    assert chosen("--multi-label", "--keep-ratio", 0.5) == tdk.DropPolicy.fixed(0.5)


def test_many_labels(checkpoints, photos):
    """Rows hold sigmoid scores, and policies that mix answers are refused."""
    result = classify(checkpoints, photos / "b.png", "--multi-label", "--keep-ratio", 1)
    row = json.loads(result.stdout.splitlines()[0])
    image = torch.from_numpy(np.array(Image.open(photos / "b.png").convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        scores = load_model(str(checkpoints / "target"))(image)[0].sigmoid()
    told = {entry["name"]: entry["probability"] for entry in row["top"]}
    assert told == pytest.approx(dict(zip(NAMES, scores.tolist(), strict=True)), abs=1e-3)
    assert abs(sum(told.values()) - 1) > 0.1
    result = classify(checkpoints, photos / "b.png", "--multi-label", "--tau", 0.9)
    assert result.exit_code == 1 and "multi_label=True" in result.output


def test_guidance_is_loaded_before_the_large_model(photos, monkeypatch):
    monkeypatch.setattr(
        options, "load_model", lambda spec, argument="model", **_: pytest.fail(f"{argument} was loaded")
    )
    result = run("classify", photos, "--model", "vit_bas_patch16_224")
    assert "near to it" in result.output
    loaded = []
    monkeypatch.setattr(options, "load_model", lambda spec, argument="model", **_: loaded.append(argument) or 1 / 0)
    run("classify", photos, "--model", "test_vit")
    assert loaded == ["guidance"]


def stopped_after(batches, monkeypatch, stop):
    """Call ``stop`` when this many batches have been yielded."""
    original = Predictor.batches

    def stopping(self, files):
        for number, seen in enumerate(original(self, files)):
            if number == batches:
                stop()
            yield seen

    monkeypatch.setattr(Predictor, "batches", stopping)


def rows_in(out):
    return [json.loads(line)["path"].rsplit("/", 1)[1] for line in out.read_text().splitlines()]


def record_of(out):
    return json.loads(out.with_name(f"{out.name}.run.json").read_text())


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal. A job in the background ignores it, and so do the tests there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("interruptible")
def test_a_signal_keeps_what_was_done(checkpoints, photos, tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    out = tmp_path / "results.jsonl"
    with monkeypatch.context() as patch:
        stopped_after(1, patch, lambda: signal.raise_signal(number))
        result = classify(checkpoints, photos, "--out", out, "--batch-size", 2)
    assert result.exit_code == 128 + number and signal.getsignal(number) is before
    assert rows_in(out) == FILES[:2]
    assert f"interrupted after 2 of 7 images; --resume continues {out}" in result.output
    assert "images       3, unreadable 1" in result.output
    (run,) = record_of(out)["runs"]
    assert (run["ended"], run["rows"]) == ("interrupted", 2)
    result = classify(checkpoints, photos, "--out", out, "--batch-size", 2)
    assert result.exit_code == 1 and f"{out}' exists; --resume continues it, or remove it" in result.output
    result = classify(checkpoints, photos, "--out", out, "--resume")
    assert result.exit_code == 0 and "2 rows are there, 5 of 7 images are left" in result.output
    assert rows_in(out) == FILES
    assert [run["ended"] for run in record_of(out)["runs"]] == ["interrupted", "complete"]


@pytest.mark.parametrize("error", [None, RuntimeError("a loading process was terminated")], ids=["alone", "error"])
def test_a_signal_that_a_destructor_swallows_still_stops_the_run(checkpoints, photos, tmp_path, monkeypatch, error):
    class Swallowing:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def stop():
        Swallowing()
        if error:
            raise error

    monkeypatch.setattr(sys, "unraisablehook", lambda raised: None)
    stopped_after(1, monkeypatch, stop)
    out = tmp_path / "results.jsonl"
    assert classify(checkpoints, photos, "--out", out, "--batch-size", 2).exit_code == 143
    assert rows_in(out) == (FILES[:2] if error else FILES[:4])


def test_a_signal_before_the_first_row_leaves_no_file(checkpoints, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(options, "load_model", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    result = classify(checkpoints, photos, "--out", tmp_path / "results.jsonl")
    assert result.exit_code == 143 and result.output.splitlines()[-1] == "interrupted"
    assert os.listdir(tmp_path) == []


def test_an_ignored_signal_stays_ignored(checkpoints, photos, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stopped_after(1, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
        result = classify(checkpoints, photos, "--out", tmp_path / "rows.jsonl", "--batch-size", 2)
        assert result.exit_code == 0 and rows_in(tmp_path / "rows.jsonl") == FILES
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_failing_run_keeps_its_rows(checkpoints, photos, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("out of luck")

    out = tmp_path / "rows.jsonl"
    with monkeypatch.context() as patch:
        stopped_after(1, patch, fail)
        result = classify(checkpoints, photos, "--out", out, "--batch-size", 2)
    assert isinstance(result.exception, RuntimeError) and rows_in(out) == FILES[:2]
    assert record_of(out)["runs"][0]["ended"] == "failed"
    assert classify(checkpoints, photos, "--out", out, "--resume").exit_code == 0 and rows_in(out) == FILES


def test_a_mistake_leaves_no_file(checkpoints, photos, tmp_path):
    for arguments in ([photos, "--gamma", -1], [photos, "--guidance", "resnet17"]):
        assert classify(checkpoints, *arguments, "--out", tmp_path / "rows.csv").exit_code == 1
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_unreadable_images_are_rows_in_their_places(checkpoints, photos, tmp_path, batch_size):
    out = tmp_path / "rows.jsonl"
    result = classify(
        checkpoints, photos / "text.png", photos, photos / "text.png", "--out", out, "--batch-size", batch_size
    )
    assert result.exit_code == 0 and rows_in(out) == ["text.png", *FILES, "text.png"]
    result = classify(checkpoints, photos / "text.png", photos, photos / "text.png", "--out", out, "--resume")
    assert (
        result.exit_code == 0 and "9 rows are there, 0 of 9 images are left" in result.output and len(rows_in(out)) == 9
    )


def test_unreadable_images_alone_are_an_error(checkpoints, photos, tmp_path):
    result = classify(checkpoints, photos / "text.png", "--out", tmp_path / "rows.jsonl")
    assert result.exit_code == 1 and "no image could be read" in result.output
    assert rows_in(tmp_path / "rows.jsonl") == ["text.png"]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_other_formats_and_top(checkpoints, photos, tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "rows"
    given = (photos, "--out", out, "--format", form, "--top", 2)
    assert classify(checkpoints, *given).exit_code == 0
    if form == "csv":
        header, *lines = out.read_text().splitlines()
        assert header.count("probability_") == 4 and len(lines) == 7
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(out)
        assert [len(top) for top in table["top"].to_pylist() if top] == [2] * 5
    assert sorted(os.listdir(tmp_path)) == ["rows", "rows.run.json"]
    assert classify(checkpoints, *given, "--resume").exit_code == 0


def test_the_record_of_a_run(checkpoints, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/tinydrop", "classify", "a b"])
    out = tmp_path / "rows.jsonl"
    given = (photos, "--out", out, "--guidance-size", 48, "--gamma", "inf")
    classify(checkpoints, *given)
    record = record_of(out)
    target = load_model(str(checkpoints / "target"))
    assert record["schema"] == 1 and record["top"] == 5 and record["policy"]["gamma"] == "inf"
    assert record["target"] == {**fingerprint_of(target, 5)._asdict(), "input_size": [32, 32]}
    assert record["guidance"]["weights"] == fingerprint_of(load_model(str(checkpoints / "guidance")), 5).weights
    assert record["guidance"]["input_size"] == [48, 48]
    (run,) = record["runs"]
    assert run["command"] == ["tinydrop", "classify", "a b"] and run["versions"]["torch"] in torch.__version__
    assert (run["ended"], run["rows"], run["images"], run["unreadable"], run["exits"]) == ("complete", 7, 5, 2, 0)
    assert run["mean_keep"] == 1 and run["flops_saved"] < 0 and run["images_per_second"] > 0


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (("--tau", 0.5), "policy"),
        (("--guidance-size", 48), "guidance"),
        (("--dtype", "bfloat16"), "target"),
        (("--top", 3), "top"),
    ],
)
def test_rows_of_other_runs_are_not_mixed(checkpoints, photos, tmp_path, other, name):
    out = tmp_path / "rows.jsonl"
    classify(checkpoints, photos / "more", "--out", out)
    rows = out.read_text()
    result = classify(checkpoints, photos, "--out", out, "--resume", *other)
    assert result.exit_code == 1 and f"resume: the rows in {str(out)!r} are of another {name}: got" in result.output
    assert out.read_text() == rows
    record = out.with_name("rows.jsonl.run.json")
    record.write_text("nonsense")
    result = classify(checkpoints, photos, "--out", out, "--resume", *other)
    assert result.exit_code == 1 and "is not the record of a run; remove it to go on without it" in result.output
    record.unlink()
    assert classify(checkpoints, photos, "--out", out, "--resume", *other).exit_code == 0 and len(rows_in(out)) == 7


def test_an_error_that_ends_the_run_is_one_clear_line(checkpoints, photos, monkeypatch):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    stopped_after(0, monkeypatch, run_out)
    result = classify(checkpoints, photos)
    assert result.exit_code == 1 and "CUDA out of memory." in result.output and "--batch-size" in result.output


def test_skipped_folders_are_told(checkpoints, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes((photos / "a.jpg").read_bytes())
    (tmp_path / "photos" / "loop").symlink_to(tmp_path / "photos")
    result = classify(checkpoints, tmp_path)
    assert result.exit_code == 0
    assert f"skipped {tmp_path}/photos/loop: the same folder as {tmp_path}/photos" in result.output


def test_summary_says_when_dropping_does_not_pay():
    report = fake_report(exits=2, second_looks=1, kept_patches=48, patches=96, calls=4, read_backs=8)
    slow = replace(report, flops=250, guidance_flops=200, wall_seconds=2.0, dense_seconds=1.0)
    predictor = SimpleNamespace(report=slow, unreadable=[], agreeing=6)
    told = cli.summary(predictor, "cpu")
    assert "mean keep    50.0% (of the dense patches, for images that did not exit)" in told
    assert "second looks 1 (12.5%)" in told and "speed-up     0.50 x" in told and "agreement    75.0%" in told
    assert "FLOPs saved  -150.0% (guidance included); exits alone would save 20.0%" in told
    assert "packing and 8 read-backs in 4 batches included" in told
    assert "note: the patched model is slower than dense here, in batches of 2: 4.0 against 8.0 images/s" in told
    assert "note: the guidance model alone costs 2.0 times the FLOPs of the dense model" in told
    predictor.report = replace(report, wall_seconds=2.0, dense_seconds=3.0)
    assert "note" not in cli.summary(predictor, "cpu")


def test_graphs_need_a_gpu(checkpoints, photos):
    if torch.cuda.is_available():
        assert "CUDA graphs" in classify(checkpoints, photos, "--graphs", "--device", "cuda").output
    else:
        result = classify(checkpoints, photos, "--graphs")
        assert result.exit_code == 1 and "graphs: got a model on cpu, expected one on a GPU" in result.output


def test_stages_are_told(checkpoints, photos):
    (line,) = [line for line in classify(checkpoints, photos, "--stages").output.splitlines() if "ms per image" in line]
    assert all(f" {stage} " in line for stage in ("guidance", "select", "pack", "blocks"))
    assert "ms per image" not in classify(checkpoints, photos).output


def visualize(checkpoints, *arguments):
    models = ("--model", checkpoints / "target", "--guidance", checkpoints / "guidance")
    return run("visualize", *models, *arguments)


def test_visualize(checkpoints, photos, tmp_path):
    out = tmp_path / "new" / "folder"
    result = visualize(checkpoints, photos, "--out", out, "--batch-size", 2, "--tau", 0.5, "--dense")
    assert result.exit_code == 0, result.output
    pictures = ["0001_a.png", "0002_b.png", "0003_e.png", "0004_c.png", "0005_d.png"]
    assert sorted(os.listdir(out)) == [*pictures, "index.html"]
    for picture in pictures:
        assert Image.open(out / picture).size == (3 * 32 + 2 * 8, 32)
    page = (out / "index.html").read_text()
    assert page.count("<article") == 5 and page.count('scope="row">dense') == 5
    assert "images       5, unreadable 2" in result.output and "agreement" in result.output
    assert f"page         {out / 'index.html'} (0.0 MB)" in result.output


def test_dense_is_asked_if_wanted(checkpoints, photos, tmp_path):
    result = visualize(checkpoints, photos / "a.jpg", "--out", tmp_path)
    assert 'scope="row">dense' not in (tmp_path / "index.html").read_text() and "agreement" not in result.output


def test_ctrl_c_keeps_what_was_drawn(checkpoints, photos, tmp_path, monkeypatch):
    batches = Predictor.batches

    def interrupted(self, files):
        yield next(batches(self, files))
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "batches", interrupted)
    result = visualize(checkpoints, photos, "--out", tmp_path, "--batch-size", 2)
    assert result.exit_code == 130 and "interrupted after 2 of 7 images" in result.output
    assert (tmp_path / "index.html").read_text().count("<article") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PHOTOS/more"], "Missing option '--out'"),
        (["PHOTOS/more", "--out", "PHOTOS/a.jpg"], "is a file"),
        (["PHOTOS/more", "--out", "PHOTOS/a.jpg/folder"], "cannot be written: Not a directory"),
        (["PHOTOS/text.png", "--out", "OUT"], "no image could be read"),
        (["PHOTOS/more", "--out", "OUT", "--guidance", "resnet17"], "guidance: got 'resnet17'"),
    ],
)
def test_mistakes_of_visualize_are_one_clear_line(checkpoints, photos, tmp_path, arguments, message):
    places = {"PHOTOS": str(photos), "OUT": str(tmp_path)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    result = visualize(checkpoints, *arguments)
    assert result.exit_code != 0 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "index.html").exists()


def test_the_help_is_quick_and_true():
    """The help imports neither torch nor timm, and has the first line of each command's own help."""
    program = "import sys; from tinydrop_kernels.cli.main import main; main(['--help'], standalone_mode=False); "
    program += "print(sorted({'torch', 'timm', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    for name, (_, line) in COMMANDS.items():
        assert main.get_command(None, name).help.split("\n")[0] == line
