"""Tests of row files: a file is either complete or unchanged."""

import io
import os
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from tinydrop_kernels.predict.row_file import RowFile, RowFileError


def write(path, *lines):
    with RowFile(path) as rows:
        for line in lines:
            rows.write(line)
    return rows


def test_the_file_appears_at_the_end(tmp_path):
    path = tmp_path / "rows"
    path.write_text("earlier")
    path.chmod(0o640)
    with RowFile(path) as rows:
        rows.write("one")
        rows.write("two")
        assert path.read_text() == "earlier"
    assert path.read_text() == "one\ntwo\n" and rows.written == 2
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["rows"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "rows"
    path.write_text("earlier")
    with pytest.raises(error), RowFile(path) as rows:
        rows.write("one")
        raise error
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["rows"]


def test_no_row_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "rows"
    path.write_text("earlier")
    write(path)
    assert path.read_text() == "earlier" and os.listdir(tmp_path) == ["rows"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "rows").read_text() == "one\n"


def test_a_full_disk_is_told():
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("there is no /dev/full on this system")
    with pytest.raises(RowFileError, match="out: '/dev/full' cannot be written: No space left on device"):
        write(full, "one")
    with pytest.raises(RowFileError, match="No space left"):
        write(full, *["a long line" * 1000] * 10)
    assert full.is_char_device()


def test_rows_that_cannot_be_put_in_place_are_kept(tmp_path):
    with (
        pytest.raises(RowFileError, match="cannot be written: .*; the rows are in '.*.part'"),
        RowFile(tmp_path / "rows") as rows,
    ):
        rows.write("one")
        (tmp_path / "rows").mkdir()
    (part,) = tmp_path.glob(".rows.*.part")
    assert part.read_text() == "one\n"


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(RowFileError, match="cannot be written: No such file or directory"):
        write(tmp_path / "none" / "rows", "one")


def test_printed_rows_do_not_stick_to_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=terminal):
        write(None, "one", "two")
    printed = terminal.getvalue()
    assert "0/2" in printed and "\rone\n" in printed and "\rtwo\n" in printed
