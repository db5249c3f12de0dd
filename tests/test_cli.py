"""The command line, run as a user runs it, on checkpoints and images made here."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_guidance, tiny_vit
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

import tinydrop_kernels as tdk
from tinydrop_kernels import cli
from tinydrop_kernels.checkpoints import class_names, load_model

NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A target and a guidance model as folders, and the target's weights as one file."""
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
    """Images of several formats, modes and sizes in nested folders, and two that cannot be read."""
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
    (folder / "notes.txt").write_text("not looked at")
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


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
    assert [row["path"].rsplit("/", 1)[1] for row in rows] == ["a.jpg", "b.png", "e.webp", "c.bmp", "d.gif"]
    for row in rows:
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
    assert "exits        1 (100.0%)" in result.output and "none stayed" in result.output


def test_half_precision(checkpoints, photos):
    assert classify(checkpoints, photos / "a.jpg", "--dtype", "bfloat16").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/file.jpg"], "does not exist"),
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
        (["PHOTOS/more", "--out", "/no/such/folder/results.jsonl"], "out: there is no folder"),
    ],
)
def test_mistakes_are_one_clear_line(checkpoints, photos, arguments, message):
    result = classify(checkpoints, *[a.replace("PHOTOS", str(photos)) for a in arguments])
    assert result.exit_code != 0 and message in result.output
    assert "Traceback" not in result.output


def test_folder_without_images(checkpoints, tmp_path):
    result = classify(checkpoints, tmp_path)
    assert result.exit_code != 0 and "no image in" in result.output


def test_checkpoint_file_tells_its_classes(tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=7)
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save(model.state_dict(), tmp_path / name)
        loaded = load_model(f"test_vit={tmp_path / name}")
        assert loaded.num_classes == 7 and not loaded.training
        assert torch.equal(loaded.head.weight, model.head.weight)
        assert class_names(loaded) == [str(i) for i in range(7)]


def test_checkpoint_file_at_another_size(tmp_path):
    """Positions are resampled as timm resamples those of its own weights."""
    import timm

    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load_model(f"test_vit={tmp_path / 'w.safetensors'}", img_size=96)
    model.set_input_size(96)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_class_names():
    import timm

    assert class_names(timm.create_model("test_vit"))[207] == "golden retriever"


def test_info_tells_every_operator():
    result = run("info")
    assert result.exit_code == 0
    for name in ("torch", "timm", "device", *tdk.ops.OPERATORS):
        assert f"\n{name} " in result.output
    assert f"torch                 {torch.__version__}".split("+")[0] in result.output
