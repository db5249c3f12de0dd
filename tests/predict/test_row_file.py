"""Tests of files of rows: no row is lost or doubled, and nothing that is not ours is cut off."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from tqdm import tqdm

from tinydrop_kernels.predict import parquet, row_file
from tinydrop_kernels.predict.prediction import Candidate, Prediction, unreadable_row
from tinydrop_kernels.predict.row_file import (
    PrintedRows,
    RowFileError,
    file_of_rows,
    format_of,
    remaining,
)

FORMATS = ["jsonl", "csv", "parquet"]
NAMES = [
    "a.png",
    'quote " and, comma.png',
    "new\nline.png",
    "return\rhere.png",
    "both\r\n.png",
    "caf\udce9.png",
    "鳥.png",
]
BEE, ANT = Candidate(1, 'bee, "honey"', 0.75), Candidate(0, "ant", 0.25)


def row(name="a.png", **changes):
    fields = {"exited": False, "confidence": 0.5, "kept": 4, "patches": 16, "grid": (4, 4), "second_look": True}
    return Prediction(0, name, **(fields | {"top": (BEE, ANT)} | changes)).as_dict()


@pytest.fixture(params=FORMATS)
def form(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


@pytest.fixture
def path(tmp_path, form):
    return tmp_path / f"rows.{form}"


def write(path, *batches, resume=False, finish=True, top=2):
    """Write batches of rows as a run does, and return the file object."""
    with file_of_rows(path, format_of(path), top, resume) as rows:
        for batch in batches:
            rows.append(batch)
        if finish:
            rows.finish()
    return rows


def growing(path):
    """Return the file that grows batch by batch: for Parquet, the journal."""
    return path.with_name(f"{path.name}.jsonl") if path.suffix == ".parquet" else path


def read(path):
    """Return the rows of a file as another program reads them."""
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    if path.suffix == ".parquet":
        return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def paths_in(path):
    return [row["path"] for row in read(path)]


def test_fields_arrive(path):
    guidance = row("b", exited=True, confidence=float("nan"), kept=0, guidance=ANT)
    write(path, [row("a"), guidance], [unreadable_row("c", "no image")], [row("d", dense=BEE)])
    a, b, c, d = read(path)
    if path.suffix == ".csv":
        top = {"class_1": "1", "name_1": 'bee, "honey"', "probability_1": "0.75", "class_2": "0", "name_2": "ant"}
        assert a | top == a and a["exit"] == "false" and (a["grid_rows"], a["grid_columns"]) == ("4", "4")
        assert b["exit"] == "true" and b["confidence"] == "" and b["name_guidance"] == "ant"
        assert {name for name, value in c.items() if value} == {"path", "error"} and c["error"] == "no image"
        assert d["name_dense"] == 'bee, "honey"' and d["second_look"] == "true" and d["of"] == "16"
    else:
        full = row("a") | ({"error": None, "guidance": None, "dense": None} if path.suffix == ".parquet" else {})
        assert a == full
        assert b["exit"] is True and b["confidence"] is None and b["guidance"]["name"] == "ant"
        assert {name: value for name, value in c.items() if value is not None} == {"path": "c", "error": "no image"}
        assert d["dense"] == {"class": 1, "name": 'bee, "honey"', "probability": 0.75}


def test_every_batch_is_in_the_file_at_once(path):
    with file_of_rows(path, format_of(path), 2, False) as rows:
        sizes = []
        for number in range(3):
            rows.append([row(f"{number}")])
            sizes.append(growing(path).stat().st_size)
    assert 0 < sizes[0] < sizes[1] < sizes[2] and rows.written == 3


def test_every_batch_is_synchronised(path, monkeypatch):
    synchronised = []
    monkeypatch.setattr(row_file.os, "fsync", lambda number: synchronised.append(os.fstat(number).st_size))
    write(path, [row("a")], [row("b")], finish=False)
    assert len(synchronised) == 2 and synchronised[1] == growing(path).stat().st_size


def test_a_file_that_exists_is_refused(path):
    write(path, [row("a")])
    before = path.read_bytes()
    with pytest.raises(RowFileError, match=f"{path.name}' exists; --resume continues it, or remove it"):
        write(path, [row("b")])
    assert path.read_bytes() == before


def test_a_journal_that_exists_is_refused(path):
    write(path, [row("a")], finish=False)
    with pytest.raises(RowFileError, match="exists; --resume continues it"):
        write(path, [row("b")])


def test_an_empty_file_is_taken(path):
    path.touch()
    write(path, [row("a")])
    assert paths_in(path) == ["a"]


def test_a_run_without_rows_leaves_nothing(path):
    write(path, [], finish=False)
    assert not growing(path).exists() and not path.exists()
    path.touch()
    write(path, finish=False)
    assert path.exists()


def test_a_resumed_run_without_rows_changes_nothing(path):
    write(path, [row("a")])
    before = path.read_bytes()
    write(path, resume=True, finish=False)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_resumed_rows_follow(path):
    """The rows before are known by their paths, with all characters that paths can have."""
    write(path, [row(name) for name in NAMES[:4]], finish=False)
    rows = write(path, [row(name) for name in NAMES[4:]], resume=True, finish=False)
    assert rows.done == Counter(NAMES[:4]) and rows.written == 3
    rows = write(path, resume=True)
    written = [name.replace("\udce9", r"\udce9") for name in NAMES]
    assert rows.done == Counter(written) and paths_in(path) == written
    assert path.read_bytes().count(b"path") <= 1 or path.suffix != ".csv"  # one header


def test_a_complete_file_is_continued(path):
    write(path, [row("a"), unreadable_row("b", "no image")])
    rows = write(path, [row("c")], resume=True)
    assert rows.done == {"a": 1, "b": 1} and paths_in(path) == ["a", "b", "c"]
    assert os.listdir(path.parent) == [path.name]


def test_a_file_cut_at_any_byte_is_continued(path):
    """Complete rows stay, no matter which byte was the last, and a torn one is written again."""
    names = NAMES[1:6]
    write(path, [row(name) for name in names], finish=False)
    complete = growing(path).read_bytes()
    for size in range(len(complete) + 1):
        growing(path).write_bytes(complete[:size])
        with file_of_rows(path, format_of(path), 2, True) as rows:
            text = [name.replace("\udce9", r"\udce9") for name in names]
            rows.append([row(names[position]) for position in remaining(text, rows.done)])
        assert growing(path).read_bytes() == complete


@pytest.mark.parametrize(
    "content", [b"notes of mine", b"notes\nof mine\n", b'{"path": 3}\n', b"[1]\n", b"\x00" * 20, b"\xff\n"]
)
def test_what_is_not_ours_is_left_alone(path, content):
    growing(path).write_bytes(content)
    with pytest.raises(RowFileError, match="resume: .* does not hold rows"):
        write(path, [row("a")], resume=True)
    assert growing(path).read_bytes() == content


def test_a_broken_row_in_the_middle_is_refused(path):
    write(path, [row("a")], [row("b")], finish=False)
    end = b"\r\n" if path.suffix == ".csv" else b"\n"
    content = growing(path).read_bytes().replace(end, end + b"broken" + end, 2)
    growing(path).write_bytes(content)
    with pytest.raises(RowFileError, match="from byte .* on"):
        write(path, [row("c")], resume=True)
    assert growing(path).read_bytes() == content


def test_columns_of_another_top_are_refused(tmp_path):
    write(tmp_path / "rows.csv", [row("a")], top=2)
    with pytest.raises(RowFileError, match="it has other columns, which depend on --top"):
        write(tmp_path / "rows.csv", [row("b")], top=3, resume=True)


class Full:
    """A file on a disk that becomes full: it takes some bytes more, and then none."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        taken = min(self.room, len(data))
        self.room -= taken
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:taken])


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_leaves_complete_rows(path, room):
    with file_of_rows(path, format_of(path), 2, False) as rows:
        rows.append([row("a"), row("b")])
        before = growing(path).read_bytes()
        rows._file = Full(rows._file, room)
        with pytest.raises(RowFileError, match="cannot be written: No space left on device; the rows before are kept"):
            rows.append([row("c"), row("d")])
    assert growing(path).read_bytes() == before and rows.written == 2
    assert write(path, [row("c"), row("d")], resume=True).done == {"a": 1, "b": 1}
    assert paths_in(path) == ["a", "b", "c", "d"]


def test_short_writes_are_continued(path):
    class Slow(Full):
        def write(self, data):
            return self.file.write(data[:7])

    with file_of_rows(path, format_of(path), 2, False) as rows:
        rows._file = Slow(rows._file, 0)
        rows.append([row("a"), row("b")])
        rows.finish()
    assert paths_in(path) == ["a", "b"]


def test_an_interrupted_batch_is_dropped(path, monkeypatch):
    write(path, [row("a")], finish=False)
    before = growing(path).read_bytes()

    def interrupt(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), file_of_rows(path, format_of(path), 2, True) as rows:
        monkeypatch.setattr(row_file.os, "fsync", interrupt)
        rows.append([row("b")])
    assert growing(path).read_bytes() == before and rows.written == 0


@pytest.mark.slow
def test_two_processes_do_not_write_one_file(path):
    program = f"""
from pathlib import Path
from tinydrop_kernels.predict.row_file import file_of_rows
with file_of_rows(Path({str(path)!r}), {format_of(path)!r}, 2, True): pass
"""
    with file_of_rows(path, format_of(path), 2, False) as rows:
        rows.append([row("a")])
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "another process is writing" in done.stderr
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_regular_files_are_written(tmp_path, form):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RowFileError, match="'.*pipe' is not a regular file; without --out, rows go to standard output"):
        file_of_rows(tmp_path / "pipe", form, 2, False).__enter__()


def test_a_folder_that_is_not_there_is_an_error(tmp_path, form):
    with pytest.raises(RowFileError, match="cannot be written: No such file or directory"):
        write(tmp_path / "none" / f"rows.{form}", [row("a")])


def test_a_link_stays_a_link(path):
    target = path.with_name(f"target{path.suffix}")
    path.symlink_to(target)
    write(path, [row("a")])
    assert path.is_symlink() and paths_in(target) == ["a"]


def test_formats_are_those_of_the_endings(tmp_path, monkeypatch):
    for ending, form in ((".jsonl", "jsonl"), (".ndjson", "jsonl"), (".CSV", "csv")):
        assert format_of(tmp_path / f"rows{ending}") == form
    assert format_of(tmp_path / "rows.txt", "csv") == "csv"
    for name in ("rows.json", "rows"):
        with pytest.raises(
            ValueError, match=r"out: got '.*', expected a name that ends in .jsonl, .ndjson, .csv, .parq"
        ):
            format_of(tmp_path / name)
    monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="parquet needs pyarrow: pip install"):
        format_of(tmp_path / "rows.parquet")


def test_a_parquet_file_is_complete_or_absent(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    monkeypatch.setattr(parquet, "ROWS_PER_GROUP", 2)
    write(path, [row(str(number)) for number in range(5)])
    assert pq.ParquetFile(path).num_row_groups == 3 and paths_in(path) == ["0", "1", "2", "3", "4"]
    complete = path.read_bytes()

    class Failing(pq.ParquetWriter):
        def write_table(self, table):
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(RowFileError, match="No space left on device; all rows are in '.*jsonl'"),
    ):
        patch.setattr(pq, "ParquetWriter", Failing)
        write(path, [row("5")], resume=True)
    assert path.read_bytes() == complete and sorted(os.listdir(tmp_path)) == ["rows.parquet", "rows.parquet.jsonl"]
    assert write(path, resume=True).done.total() == 6 and len(read(path)) == 6


def test_another_parquet_file_is_left_alone(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    for content in (None, {"path": ["a"]}):
        path.write_bytes(b"not Parquet") if content is None else pq.write_table(pa.table(content), path)
        before = path.read_bytes()
        with pytest.raises(RowFileError, match="resume: .*rows.parquet' cannot be read: "):
            write(path, [row("a")], resume=True)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["rows.parquet"]


def test_inputs_without_a_row_remain():
    assert remaining(["a", "b", "a", "c", "a"], Counter({"a": 2, "z": 1})) == [1, 3, 4]


def test_printed_rows_do_not_stick_to_a_progress_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=2, file=terminal), PrintedRows() as rows:
        rows.append([unreadable_row("a", "b"), unreadable_row("c", "d")])
    printed = terminal.getvalue()
    assert "0/2" in printed and '\r{"path": "a", "error": "b"}\n' in printed and '\r{"path": "c"' in printed
    assert rows.written == 2
