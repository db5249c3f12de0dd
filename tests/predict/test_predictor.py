"""Tests of the predictor: one row for each readable input, in order."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
from fakes import FakePatched
from helpers import tiny_guidance, tiny_vit
from PIL import Image

import tinydrop_kernels as tdk
from tinydrop_kernels.predict.predictor import Predictor

BRIGHTNESS = (0, 80, 150, 255)  # one for each class


def grey(value, *shape):
    return np.full(shape or (8, 8, 3), value, dtype=np.uint8)


def encoded(value):
    file = io.BytesIO()
    Image.fromarray(grey(value)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """Return an input of every kind. The class of each input is its index modulo 4."""
    file = tmp_path / "black.png"
    file.write_bytes(encoded(0))
    return [
        file,
        encoded(80),
        Image.fromarray(grey(150)),
        grey(255),
        str(file),
        grey(80, 9, 7),
        grey(150, 9, 7, 1),
        np.ones((9, 7, 3), dtype=np.float64),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_come_in_order(mixed, workers):
    predictor = Predictor(FakePatched(), batch_size=3, workers=workers)
    rows = list(predictor.predict(mixed))
    assert [row.index for row in rows] == list(range(8))
    assert [row.top[0].label for row in rows] == [0, 1, 2, 3] * 2
    assert [row.name for row in rows] == [str(mixed[0]), "#1", "#2", "#3", str(mixed[0]), "#5", "#6", "#7"]
    assert [row.exited for row in rows] == [False, False, False, True] * 2
    assert [row.second_look for row in rows] == [False, True, False, False] * 2
    assert [row.kept for row in rows] == [2, 2, 2, 0] * 2
    assert {(row.patches, row.grid) for row in rows} == {(16, (2, 2))}
    assert (predictor.report.images, predictor.report.exits, predictor.report.second_looks) == (8, 2, 2)
    assert predictor.report.wall_seconds > 0 and predictor.report.dense_seconds is None


def test_top_classes_are_sorted_and_named():
    (row,) = Predictor(FakePatched(), top=3).predict([grey(150)])
    assert row.top[0].name == "light" and len(row.top) == 3
    assert row.top[0].probability == pytest.approx(torch.eye(4)[2].softmax(0)[2].item())
    (row,) = Predictor(FakePatched(), top=9).predict([grey(150)])
    assert len(row.top) == 4 and sum(candidate.probability for candidate in row.top) == pytest.approx(1)


def test_a_stream_is_drawn_as_needed():
    drawn = []

    def stream():
        for value in BRIGHTNESS * 5:
            drawn.append(value)
            yield grey(value)

    rows = Predictor(FakePatched(), batch_size=2).predict(stream())
    assert not drawn
    next(rows)
    assert len(drawn) <= 4
    assert len(list(rows)) == 19


def test_first_batch_goes_through_twice_and_counts_once():
    predictor = Predictor(FakePatched(), batch_size=2)
    list(predictor.predict([grey(0)] * 5))
    assert [len(images) for images in predictor.model.seen] == [2, 2, 2, 1]
    list(predictor.predict([grey(0)] * 2))
    assert len(predictor.model.seen) == 5 and predictor.report.images == 7


def test_unreadable_images_are_warned_of_and_left_out(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    inputs = [grey(0), tmp_path / "text.png", tmp_path / "gone.png", grey(255), None, b"", np.zeros((2, 2, 5))]
    predictor = Predictor(FakePatched(), batch_size=2)
    with pytest.warns(UserWarning, match="skipped ") as warned:
        rows = list(predictor.predict(inputs))
    assert [row.index for row in rows] == [0, 3]
    names = [name for name, _ in predictor.unreadable]
    assert names == [str(tmp_path / "text.png"), str(tmp_path / "gone.png"), "#4", "#5", "#6"]
    assert len(warned) == 5 and predictor.report.images == 2
    assert "No such file" in predictor.unreadable[1][1]
    assert predictor.unreadable[2][1].startswith("image: got NoneType, expected a path")


def test_unreadable_images_can_be_told_otherwise():
    told = []
    predictor = Predictor(FakePatched(), on_unreadable=lambda name, reason: told.append((name, reason)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(predictor.predict([b"no image"])) == []
    assert told == predictor.unreadable and told[0][0] == "#0"
    assert predictor.report is None


def test_batches_stay_aligned():
    predictor = Predictor(FakePatched(), batch_size=2, on_unreadable=lambda *_: None)
    entries = predictor.predict_batch([grey(0), b"no image", grey(255)])
    assert [entry and entry.top[0].label for entry in entries] == [0, None, 3]


def test_read_only_arrays_are_taken():
    images = np.stack([grey(value) for value in BRIGHTNESS])
    images.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = Predictor(FakePatched()).predict_batch(images)
    assert [entry.top[0].label for entry in entries] == [0, 1, 2, 3]


def test_rows_are_valid_json():
    predictor = Predictor(FakePatched(confidence=float("nan")), compare_dense=True)
    (row,) = predictor.predict([grey(80)])
    plain = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert plain["confidence"] is None and plain["path"] == "#0"
    assert plain["top"][0] == {"class": 1, "name": "dark", "probability": 0.4754}
    assert plain["dense"]["name"] == "black"
    assert (plain["exit"], plain["kept"], plain["of"], plain["grid"]) == (False, 2, 16, [2, 2])
    assert plain["second_look"] is True


def test_nan_answers_are_valid_json(monkeypatch):
    model = FakePatched()
    monkeypatch.setattr(model, "forward", lambda images: FakePatched.forward(model, images) * float("nan"))
    (row,) = Predictor(model).predict([grey(80)])
    assert json.loads(json.dumps(row.as_dict(), allow_nan=False))["top"][0]["probability"] is None


def test_dense_is_compared():
    predictor = Predictor(FakePatched(), batch_size=3, compare_dense=True)
    rows = list(predictor.predict([grey(value) for value in BRIGHTNESS * 2]))
    assert predictor.agreeing == 2 and predictor.report.dense_seconds > 0
    assert {row.dense.name for row in rows} == {"black"}
    assert [row.disagreed for row in rows] == [
        True
    ] * 8  # with the dense model, or with the guidance model where dense agrees


def test_the_guidance_is_told():
    rows = list(Predictor(FakePatched()).predict([grey(value) for value in BRIGHTNESS]))
    assert [row.guidance.name for row in rows] == ["dark", "dark", "dark", "white"]
    assert [row.disagreed for row in rows] == [True, False, True, False]
    assert rows[0].as_dict()["guidance"]["class"] == 1 and "dense" not in rows[0].as_dict()


def test_guidance_of_other_classes_has_no_say():
    """A guidance model with other classes gives no candidate, because its class numbers mean other classes."""
    model = tdk.patch(tiny_vit(num_classes=4), tiny_guidance(), tdk.DropPolicy.fixed(0.5))
    (row,) = Predictor(model).predict([grey(80)])
    assert row.guidance is None and not row.disagreed and "guidance" not in row.as_dict()


def test_batches_come_with_what_happened():
    predictor = Predictor(FakePatched(), batch_size=3)
    seen = list(predictor.batches([grey(value) for value in BRIGHTNESS]))
    assert [len(batch.rows) for batch in seen] == [len(batch.images) for batch in seen] == [3, 1]
    assert [batch.call.exited.tolist() for batch in seen] == [[False] * 3, [True]]
    again = predictor.classify(seen[0].images)
    assert [row.name for row in again.rows] == ["#0", "#1", "#2"]
    assert [row.top for row in again.rows] == [row.top for row in seen[0].rows]
    assert [row.name for row in predictor.classify(seen[1].images, ["white"]).rows] == ["white"]
    with pytest.raises(ValueError, match="names: got 1, expected 3"):
        predictor.classify(seen[0].images, ["white"])


def test_grey_models():
    predictor = Predictor(FakePatched(in_chans=1))
    colour = grey(0)
    colour[:, :, 1] = 255  # green, of luminance 150
    (row,) = predictor.predict([colour])
    assert predictor.model.seen[0].shape == (1, 1, 8, 8) and row.top[0].name == "light"


def test_images_get_the_model_s_dtype():
    predictor = Predictor(FakePatched().to(torch.bfloat16))
    (row,) = predictor.predict([grey(150)])
    assert predictor.model.seen[0].dtype == torch.bfloat16 and row.top[0].name == "light"


@pytest.mark.parametrize("one", ["photo.png", b"bytes", grey(0), Image.fromarray(grey(0))])
def test_one_image_is_not_taken_for_many(one):
    with pytest.raises(TypeError, match=f"inputs: got one {type(one).__name__}, expected an iterable"):
        Predictor(FakePatched()).predict(one)
    with pytest.raises(TypeError, match="expected an iterable"):
        Predictor(FakePatched()).predict_batch(one)


def test_an_array_of_grey_images_is_many():
    rows = Predictor(FakePatched()).predict(np.stack([grey(0, 8, 8), grey(255, 8, 8)]))
    assert [row.top[0].label for row in rows] == [0, 3]


def test_models_that_cannot_predict_are_refused():
    with pytest.raises(ValueError, match="model: this VisionTransformer is not patched"):
        Predictor(tiny_vit())
    model = FakePatched()
    model.tinydrop.num_classes = 0
    with pytest.raises(ValueError, match="model: got one without classes"):
        Predictor(model)
    with pytest.raises(ValueError, match="model: it takes images of 5 channels, expected 1"):
        Predictor(FakePatched(in_chans=5))
    with pytest.raises(RuntimeError, match="in training mode"):
        list(Predictor(FakePatched().train()).predict([grey(0)]))


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("workers", -1), ("top", 0)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected a number >="):
        Predictor(FakePatched(), **{name: value})


@pytest.mark.parametrize("said_by", ["pretrained_cfg", "patch"])
def test_answers_are_those_of_the_patched_model(said_by):
    """A real model at another input size than that of its configuration gives the same answers in rows and calls."""
    model, normalization = tiny_vit(), {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    model.pretrained_cfg |= {"input_size": (3, 224, 224), "crop_pct": 1.0}
    if said_by == "pretrained_cfg":
        model.pretrained_cfg |= normalization
    told = normalization if said_by == "patch" else {}
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy.fixed(0.5), **told)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    predictor = Predictor(model, compare_dense=True)
    rows = list(predictor.predict(pixels))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.inference_mode():
        probabilities = model(images).softmax(1)
        dense = model.tinydrop.dense(images).argmax(1)
    for row, probability, label in zip(rows, probabilities, dense, strict=True):
        assert torch.tensor([c.probability for c in row.top]).allclose(probability.sort(descending=True)[0], atol=1e-5)
        assert row.kept == 8 and row.dense.label == label
    assert predictor.report.images == 2 and predictor.report.mean_keep == 0.5


def test_a_head_replaced_by_hand_has_no_names_of_imagenet():
    model = tiny_vit(num_classes=1000)
    model.head = torch.nn.Linear(32, 5)
    assert model.num_classes == 1000
    predictor = Predictor(tdk.patch(model, tiny_guidance()), top=9)
    (row,) = predictor.predict([grey(80, 32, 32, 3)])
    assert sorted(candidate.name for candidate in row.top) == ["0", "1", "2", "3", "4"]
    model.head = torch.nn.Linear(32, 7)
    model.tinydrop.policy = tdk.DropPolicy.fixed(0.5)
    (row,) = predictor.predict([grey(80, 32, 32, 3)])
    assert sorted(candidate.name for candidate in row.top) == ["0", "1", "2", "3", "4", "5", "6"]


def test_scores_of_many_labels():
    """Rows of a multi-label model hold sigmoid scores, so that several classes can be above 0.5."""
    model = tiny_vit()
    model.head.bias.data += 3.0
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    policy = tdk.DropPolicy(tau=None, gamma=0.0, min_keep=1.0, blend=0.0, second_look=None)
    predictor = Predictor(tdk.patch(model, tiny_guidance(), policy, multi_label=True), top=5, compare_dense=True)
    for seen in predictor.batches(pixels):
        scores = model.tinydrop.dense(seen.images.clone()).sigmoid()
        assert (scores > 0.5).sum() > 2
        for row, score in zip(seen.rows, scores, strict=True):
            expected = score.sort(descending=True)
            assert [candidate.label for candidate in row.top] == expected.indices.tolist()
            assert torch.tensor([c.probability for c in row.top]).allclose(expected.values, atol=1e-5)
            assert row.dense.probability == pytest.approx(expected.values[0].item(), abs=1e-5)
