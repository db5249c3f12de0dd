"""The demo's contact sheet of a call."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import fake_call
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from contact_sheet import contact_sheet


def white():
    return Image.new("RGB", (32, 32), "white")


@pytest.fixture
def call():
    """Return a call of three images: one on the dense grid, one on a coarser grid with a second look, and an exit."""
    return fake_call([[0, 5], [1], []], [(4, 4), (2, 2), (4, 4)], second_look=(1,))


def test_contact_sheet_has_two_rows(call):
    sheet = contact_sheet([white()] * 3, call, ["a", "b", "c"], width=64)
    pixels = np.asarray(sheet.convert("L"))
    assert sheet.size == (3 * 72 + 8, 2 * 90 + 8)
    top, bottom = 8 + 18, 8 + 90 + 18
    assert (pixels[top : top + 64, 8:72] == 255).all()
    assert (pixels[bottom : bottom + 16, 8:24] == 255).all() and pixels[bottom + 60, 60] < 50
    assert pixels[8:top].min() < 100  # the captions


def test_contact_sheet_goes_on_below(call):
    two = contact_sheet([white()] * 3, call, columns=2, width=64)
    assert two.size == (2 * 72 + 8, 4 * 90 + 8)
    assert contact_sheet([white()], call, width=64).size == (72 + 8, 2 * 90 + 8)


def test_long_captions_are_cut_short(call):
    def ink(caption):
        pixels = np.asarray(contact_sheet([white()] * 2, call, [caption, ""], width=64).convert("L"))
        return (pixels[:26] < 128).any(0).nonzero()[0]

    assert ink("a").max() < ink("a very long name of a class indeed").max() < 72


def test_what_was_kept_is_said(call, monkeypatch):
    said = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, place, text, *_: said.append(text))
    contact_sheet([white()] * 3, call, ["a", "b", "c"])
    assert said == ["a", "2 of 4 x 4", "b", "1 of 2 x 2, then dense", "c", "exit"]


def test_contact_sheet_refuses_what_does_not_fit(call):
    with pytest.raises(ValueError, match="images: got 4, expected 1 to 3"):
        contact_sheet([white()] * 4, call)
    with pytest.raises(ValueError, match="images: got 0"):
        contact_sheet([], call)
    with pytest.raises(ValueError, match="captions: got 1, expected 2"):
        contact_sheet([white()] * 2, call, ["a"])
