"""Runs of ``tinydrop classify`` that end at random moments. Resumed, they give the rows of a run that was not ended.

The environment variable ``TINYDROP_KILLS`` is the number of runs that each signal ends; 1 by default.
"""

import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_guidance, tiny_vit
from PIL import Image
from timm.models import save_for_hf

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("TINYDROP_KILLS", "1"))
START_UP = 4.0  # seconds from the start of a process to its first image, about
WORK = 2.0  # seconds for all images, about
FORMATS = ("jsonl", "csv", "parquet")
ENDED = {signal.SIGINT: {130}, signal.SIGTERM: {143}, signal.SIGKILL: {-signal.SIGKILL}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two models and 400 images, one in twenty unreadable."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("killed")
    config = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "input_size": (3, 32, 32)}
    for name, model in (("target", tiny_vit()), ("guidance", tiny_guidance())):
        options = {"model_config": {"num_classes": 5}, "data_config": config, "safe_serialization": True}
        save_for_hf(model, folder / name, **options)
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for number in range(400):
        path = folder / "photos" / f"{number:03d}, a photo.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        if number % 20 == 7:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def command(folder, out, *options):
    models = ["--target", folder / "target", "--guidance", folder / "guidance"]
    words = [sys.executable, "-m", "tinydrop_kernels", "classify", folder / "photos", *models, "--out", out, *options]
    return [str(word) for word in [*words, "--batch-size", "2", "--resume"]]


def begin(folder, out, *options, limit=None):
    """Start a run in a process group of its own."""

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # because a job in the background ignores it
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(folder, out, *options), preexec_fn=prepare, start_new_session=True, **output)


def expected(folder):
    return [(str(path), number % 20 == 7) for number, path in enumerate(sorted((folder / "photos").iterdir()))]


def rows_in(out):
    """Return path and unreadability of each row of a complete file."""
    if out.suffix == ".csv":
        with out.open(newline="") as file:
            return [(row["path"], row["error"] != "") for row in csv.DictReader(file)]
    if out.suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(out)
        return [(row["path"], row["error"] is not None) for row in table.to_pylist()]
    return [(row["path"], "error" in row) for row in map(json.loads, out.read_text().splitlines())]


def wait_for_record(process, record, before):
    """Wait until the run has written its record, just before the first image, or has ended."""
    while process.poll() is None and (not record.exists() or record.stat().st_mtime_ns == before):
        time.sleep(0.002)


def finish(folder, out):
    process = begin(folder, out)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert rows_in(out) == expected(folder)
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name, f"{out.name}.run.json"]


@pytest.mark.parametrize("number", ENDED, ids=lambda number: number.name)
def test_no_row_is_lost_or_doubled(folder, tmp_path, number):
    chance = random.Random(int(number))
    kills = runs = 0  # the test prints each kill; pytest -s shows them
    while kills < KILLS:
        out = tmp_path / str(runs) / f"rows.{FORMATS[runs % 3]}"
        runs += 1
        out.parent.mkdir()
        ended = False
        while not ended and kills < min(2 * runs, KILLS):  # two kills of each file, and so all formats in six
            record = out.with_name(f"{out.name}.run.json")
            before = record.stat().st_mtime_ns if record.exists() else 0
            workers = chance.choice([0, 0, 2])
            process = begin(folder, out, "--workers", workers)
            starting = chance.random() < 0.2
            if not starting:
                wait_for_record(process, record, before)
            time.sleep(chance.uniform(0, START_UP if starting else WORK))
            if process.poll() is None:
                send = os.killpg if chance.random() < 0.5 else os.kill  # a terminal signals the group, kill a process
                send(process.pid, number)
            output, _ = process.communicate(timeout=60)
            if process.returncode == 0:
                ended = True
                continue
            kills += 1
            assert starting or process.returncode in ENDED[number], output
            assert "Traceback" not in output or starting or workers, output
            size = out.stat().st_size if out.exists() else 0
            print(f"{number.name} {kills}: {out.name} of {size} bytes, {workers=}, {starting=}, {process.returncode=}")
        finish(folder, out)


def test_a_file_that_may_not_grow(folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    process = begin(folder, out, limit=20_000)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and f"{str(out)!r} cannot be written: File too large" in output
    rows = rows_in(out)
    assert rows == expected(folder)[: len(rows)] and 18_000 < out.stat().st_size <= 20_000
    assert json.loads((tmp_path / "rows.jsonl.run.json").read_text())["runs"][0]["ended"] == "failed"
    finish(folder, out)


def test_a_full_disk(folder, tmp_path):
    disk = Path(tmp_path / "disk")
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        out = disk / "rows.csv"
        process = begin(folder, out)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1 and f"{str(out)!r} cannot be written: No space left on device" in output
        rows = rows_in(out)
        assert 20 < len(rows) < 400 and rows == expected(folder)[: len(rows)]
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        finish(folder, out)
    finally:
        subprocess.run(["umount", disk], check=True)
