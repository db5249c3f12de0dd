"""Models are loaded from every kind of specification. If that fails, there is one clear error at once."""

import json
import shutil

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tinydrop_kernels.checkpoints import (
    CheckpointError,
    check_spec,
    class_names,
    difference_from_checkpoint,
    load_model,
)


@pytest.fixture
def weights(tmp_path):
    """Return a model with seven classes and the file of its weights."""
    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    return model, tmp_path / "w.safetensors"


def test_checkpoint_file_tells_its_classes(tmp_path):
    model = timm.create_model("test_vit", num_classes=7)
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save(model.state_dict(), tmp_path / name)
        loaded = load_model(f"test_vit={tmp_path / name}")
        assert loaded.num_classes == 7 and not loaded.training
        assert torch.equal(loaded.head.weight, model.head.weight)
        assert class_names(loaded) == [str(i) for i in range(7)]


def test_checkpoint_file_at_another_size(weights):
    """Position embeddings are resampled as timm does for its own weights."""
    model, file = weights
    loaded = load_model(f"test_vit={file}", img_size=96)
    model.set_input_size(96)
    assert torch.equal(loaded.pos_embed, model.pos_embed)


def test_a_file_for_other_images_is_noticed(weights):
    """The file has positions for 10 x 10 patches of 16 pixels, as ``test_vit`` at 160 px does."""
    _, file = weights
    spec = f"test_vit={file}"
    assert difference_from_checkpoint(spec, load_model(spec)) is None
    told = difference_from_checkpoint(spec, load_model(spec, img_size=96))
    assert told == f"{str(file)!r} is for image size 160 x 160, and the model runs with image size 96 x 96"


def test_a_name_is_no_local_checkpoint(weights, monkeypatch):
    """The current folder happens to have a ``config.json``."""
    model, file = weights
    (file.parent / "config.json").write_text('{"architecture": "test_vit", "mean": [0.1, 0.2, 0.3]}')
    monkeypatch.chdir(file.parent)
    assert difference_from_checkpoint("test_vit", model) is None


@pytest.mark.parametrize(
    ("config", "own"),
    [
        ({"pretrained_cfg": {"input_size": [3, 96, 128]}}, "96 x 128"),
        ({"pretrained_cfg": {"input_size": [3, 96, 96]}, "model_args": {"img_size": 64}}, "64 x 64"),
        ({"pretrained_cfg": {"input_size": [3, 96, 96]}, "model_args": {"img_size": [160, 160]}}, None),
        ({"pretrained_cfg": {"input_size": [3, 160, 160]}, "model_args": {"num_classes": 7}}, None),
    ],
)
def test_the_size_of_a_folder_is_that_of_its_config(tmp_path, config, own):
    """timm builds the model at the size in ``model_args``, if there is one."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = difference_from_checkpoint(str(tmp_path), timm.create_model("test_vit"))
    expected = f"{str(tmp_path)!r} is for image size {own}, and the model runs with image size 160 x 160"
    assert told == (expected if own else None)


def test_a_grid_that_is_not_square_may_have_a_square_number_of_patches(tmp_path):
    model = timm.create_model("test_vit", num_classes=7, img_size=(64, 144))  # 4 x 9 patches
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert difference_from_checkpoint(f"test_vit={tmp_path / 'w.safetensors'}", model) is None


def test_a_file_without_square_positions_says_nothing(weights):
    """The positions of 7 patches are those of no square, and other weights have none."""
    model, file = weights
    for positions in (torch.zeros(1, 8, 64), None):
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "pos_embed"}
        save_file(state if positions is None else state | {"pos_embed": positions}, file)
        assert difference_from_checkpoint(f"test_vit={file}", model) is None


@pytest.mark.parametrize(
    ("config", "differs"),
    [
        ({"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}, True),
        ({"architecture": "test_vit", "mean": [0.1, 0.2, 0.3]}, True),
        ({"architecture": "test_vit2", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}, False),
        ({"architecture": "test_vit", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, False),
        ([], False),
    ],
)
def test_a_config_beside_a_file_counts_if_it_is_for_the_architecture(weights, config, differs):
    model, file = weights
    (file.parent / "config.json").write_text(json.dumps(config))
    told = difference_from_checkpoint(f"test_vit.r160_in1k={file}", model)
    own = model.pretrained_cfg["mean"]
    assert told == (
        f"{str(file)!r} is for mean (0.1, 0.2, 0.3), and the model runs with mean {own}" if differs else None
    )


def test_weights_of_another_shape_are_told_in_full(weights):
    _, file = weights
    with pytest.raises(CheckpointError) as caught:
        load_model(f"test_vit2={file}")
    message = str(caught.value)
    assert message.startswith(f"model: the weights of 'test_vit2={file}' could not be loaded: RuntimeError")
    assert "Missing key(s)" in message or "size mismatch" in message
    assert "\n" not in message and len(message) < 2000
    assert "local checkpoint" not in message


def test_many_mismatches_are_counted(weights, tmp_path):
    model, _ = weights
    short = {name: tensor[:1].clone() if tensor.ndim == 1 else tensor for name, tensor in model.state_dict().items()}
    save_file(short, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"size mismatch for .* and \d+ more"):
        load_model(f"test_vit={tmp_path / 'small.safetensors'}", num_classes=7)


def test_a_file_that_is_no_checkpoint_is_told(tmp_path):
    (tmp_path / "w.pth").write_text("no weights")
    with pytest.raises(CheckpointError, match="guidance: the weights of .* could not be loaded"):
        load_model(f"test_vit={tmp_path / 'w.pth'}", "guidance")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_bas_patch16_224", "got 'vit_bas_patch16_224', expected .*; near to it: vit_base_patch16_224"),
        ("test_vit=/no/such/file", "there is no file '/no/such/file'"),
        (__file__, "there is no config.json beside"),
    ],
)
def test_specifications_are_checked_without_loading(monkeypatch, spec, message):
    monkeypatch.setattr(timm, "create_model", None)
    with pytest.raises(ValueError, match=f"guidance: {message}"):
        check_spec(spec, "guidance")
    check_spec("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k")


def test_weights_that_are_not_there_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"could not be loaded: .*NAME=FILE loads .* HF_HUB_OFFLINE=1"):
        load_model("test_vit.r160_in1k")


def test_cached_weights_need_no_hub(monkeypatch, tmp_path):
    model = timm.create_model("test_vit.r160_in1k")
    cached = tmp_path / "models--timm--test_vit.r160_in1k"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), tmp_path / "w")
    shutil.copy(tmp_path / "w", cached / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(load_model("test_vit.r160_in1k").head.weight, model.head.weight)


def test_class_names():
    assert class_names(timm.create_model("test_vit"))[207] == "golden retriever"
    assert class_names(timm.create_model("test_vit", num_classes=0)) == []
    model = timm.create_model("test_vit", num_classes=3)
    model.pretrained_cfg["label_names"] = ("ant", "bee", "cat")
    assert class_names(model) == ["ant", "bee", "cat"]
    model.pretrained_cfg["label_names"] = ("ant", "bee")  # stale names from another head
    assert class_names(model) == ["0", "1", "2"]
