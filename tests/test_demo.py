"""The demo runs, its data are split, and its weights are small and as accurate as claimed."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import class_names, load_model
from tinydrop_kernels.engine import steps

DEMO = Path(__file__).parents[1] / "demo"
sys.path.insert(0, str(DEMO))

cluttered_digits = pytest.importorskip("cluttered_digits", reason="the demo's data need scikit-learn and scikit-image")


def test_images_depend_on_seed_and_index_alone():
    data = cluttered_digits.Cluttered("test", 5, seed=3)
    again = cluttered_digits.Cluttered("test", 9, seed=3)
    image, label, box = data[2]
    assert image.shape == (224, 224, 3) and image.dtype == np.uint8 and 0 <= label <= 9
    assert np.array_equal(image, again[2][0]) and not np.array_equal(image, data[1][0])
    top, left, bottom, right = box
    assert 0 <= top < bottom <= 224 and 0 <= left < right <= 224
    with pytest.raises(IndexError):
        data[5]


def test_handwriting_and_photographs_are_split():
    train, test = cluttered_digits.Cluttered("train", 1), cluttered_digits.Cluttered("test", 1)
    assert len(train.strokes) + len(test.strokes) == 1797
    assert not set(cluttered_digits.TRAIN_PHOTOGRAPHS) & set(cluttered_digits.TEST_PHOTOGRAPHS)


def test_weights_are_small():
    assert sum(f.stat().st_size for f in (DEMO / "weights").rglob("*") if f.is_file()) <= 10 * 2**20


@pytest.mark.slow
@torch.inference_mode()
def test_saliency_earns_its_keep():
    """With the embedded models, salient patches are worth far more than as many random patches.

    The target is clearly more accurate than the guidance model, too.
    """
    data = cluttered_digits.Cluttered("test", 96, seed=7)
    pixels, labels, _ = zip(*(data[i] for i in range(96)), strict=True)
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.tensor(labels)
    model, guidance = (load_model(str(DEMO / "weights" / name)) for name in ("target", "guidance"))
    assert class_names(model) == class_names(guidance) == cluttered_digits.CLASS_NAMES

    def accuracy(logits):
        return (logits.argmax(1) == labels).float().mean().item()

    import run

    dense = accuracy(model(images))
    tdk.patch(model, guidance, run.EMBEDDED_POLICY)
    alone = accuracy(steps.guide(model.tinydrop, images).logits)
    both = accuracy(model(images))
    assert model.tinydrop.report().flops_saved > 0.5
    assert model.tinydrop.last.exited.any() and not model.tinydrop.last.exited.all()
    model.tinydrop.policy = replace(tdk.DropPolicy.fixed(0.25), saliency=run.CAM)  # a map that random weights spoil
    guided = accuracy(model(images))
    guided_counts = model.tinydrop.last.counts
    model.tinydrop.guidance.class_weight.normal_()  # makes the saliency map meaningless
    blind = accuracy(model(images))
    assert torch.equal(model.tinydrop.last.counts, guided_counts)
    assert dense > alone + 0.05
    assert both > dense - 0.03
    assert guided > blind + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True])
def test_demo_ends_in_a_table_a_picture_and_a_page(monkeypatch, capsys, tmp_path, stock):
    """The demo runs with and without the model hub. Small untrained models stand in for the hub's."""
    import run

    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "PICTURE", tmp_path / "out" / "kept_patches.png")
    monkeypatch.setattr(run, "ROUNDS", 1)
    monkeypatch.setattr(run, "hub_is_reachable", lambda: stock)
    monkeypatch.setattr(sys, "argv", ["run.py", "--images", "8", "--batch-size", "4"])
    if stock:
        small = {run.STOCK_TARGET: "test_vit", tdk.guidance.DEFAULT_GUIDANCE: "test_byobnet"}
        monkeypatch.setattr(run, "load_model", lambda spec: timm.create_model(small[spec]).eval())
    else:
        (tmp_path / "weights").symlink_to(DEMO / "weights")
    run.main()
    printed = capsys.readouterr().out
    assert ("embedded demo" in printed) is not stock
    assert ("accuracy" in printed) is not stock
    assert all(
        f"\n{way} " in printed for way in ("dense", "TinyDrop", "the paper's drop", "exits alone", "resolution alone")
    )
    assert "Calibrated to lose at most 2 points" in printed and (tmp_path / "out" / "policy.json").is_file()
    assert (tmp_path / "out" / "kept_patches.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "index.html").read_text().count("<article") == 8
    assert printed.count("index.html") == 1
