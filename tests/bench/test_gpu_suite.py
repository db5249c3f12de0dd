"""Tests of ``bench/gpu.sh`` without a GPU: every step on a few small cases, and steps that hang or fail."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SUITE = Path(__file__).parents[2] / "bench" / "gpu.sh"


def suite(*arguments, **variables):
    command = [shutil.which("bash") or pytest.skip("there is no bash"), SUITE, *arguments]
    # Without pytest-xdist's variables, because pytest-benchmark does not time anything in an xdist worker.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment = inherited | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def in_archive(file, name):
    with tarfile.open(file) as archive:
        return archive.extractfile(f"./{name}").read().decode()


def test_help_tells_what_is_written():
    done = suite("--help")
    assert done.returncode == 0 and "gpu.md" in done.stdout and "--rehearse" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = suite(tmp_path)
    assert done.returncode == 1 and "no CUDA GPU here" in done.stderr and not list(tmp_path.iterdir())


FIGURE = {
    "operator": "varlen_attention",
    "implementation": "triton",
    "backend": "triton",
    "device": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "dtype": "bfloat16",
    "batch": 256,
    "lengths": "mean 50",
    "bias": False,
    "is_default": True,
    "latency_us": 40.0,
    "device_us_graph": 12.5,
    "fraction_of_copy": 0.8,
    "copy_gb_per_s": 3000.0,
}
# A stand-in for Python. Every step ends at once, except for attention, which writes a figure and hangs.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
bench/machine.py) printf 'has %s\\n' gpu timm pytest_benchmark xdist && echo "a card; versions" ;;
*pip*) exit 1 ;;
*"not cudnn") trap '' INT && echo {figure} >>{lines} && echo -n '{{"half a line' >>{lines} && echo $$ >{pid} &&
    exec sleep 1000 ;;
*table.py*) exec {python} "$@" ;;
*end_to_end.py*--json*compiled*) cp {results}/results.tar {early}; exit 3 ;;
*) echo "3 passed in 0.1s" ;;
esac
"""


@pytest.fixture(scope="module")
def hanging(tmp_path_factory):
    """Return the folder and the output of a run in which one step hangs and another fails.

    All deadlines are 4 % of the usual ones.
    """
    folder = tmp_path_factory.mktemp("hanging")
    return folder, suite(folder / "results", **stand_in(folder), PACE="4")


def stand_in(folder):
    """Return environment variables that make gpu.sh run the stand-in."""
    python, wheels = folder / "python", folder / "wheels"
    names = {"figure": shlex.quote(json.dumps(FIGURE)), "python": sys.executable, "results": folder / "results"}
    # The folder of figures has a random name, so the stand-in reads it from its arguments.
    names |= {"lines": '"$(sed "s/.*--lines //;s/ .*//" <<<"$*")"', "early": folder / "early.tar"}
    python.write_text(STAND_IN.format(**names, pid=folder / "pid"))
    python.chmod(0o755)
    wheels.mkdir()
    (wheels / "no-1-py3-none-any.whl").touch()
    return {"PYTHON": str(python), "WHEELS": str(wheels)}


def test_a_step_that_is_killed_keeps_its_figures(hanging):
    folder, done = hanging
    page = (folder / "results" / "gpu.md").read_text()
    assert done.returncode == 1 and done.stdout.endswith(page)
    assert "* attention: STOPPED" in page and "|256|mean 50||12.5g*|" in page
    assert page.rstrip().endswith("|") and "|targets for an H200, measured on NVIDIA H100 80GB HBM3|" in page
    assert "|attention, batch 256, mean 50: at least 0.7 of the copy's rate|0.8|met|" in page


def test_a_late_step_is_skipped_and_others_go_on(hanging):
    _, done = hanging
    steps = dict(line[2:].split(": ", 1) for line in done.stdout.splitlines() if line.startswith("* "))
    assert steps["no-1-py3-none-any.whl"] == "NOT INSTALLED"
    assert steps["operators"].endswith("3 passed in 0.1s") and steps["models_eager"].startswith("done at ")
    assert steps["operators_timed"].startswith("NOT RUN, -")
    assert steps["models_compiled"] == "FAILED, exit status 3"


def test_the_archive_is_there_before_the_end(hanging):
    folder, _ = hanging
    for file in (folder / "early.tar", folder / "results" / "results.tar"):
        first, half = in_archive(file, "figures.jsonl").splitlines()
        assert json.loads(first) == FIGURE and half == '{"half a line'
    assert "attention: STOPPED" in in_archive(folder / "results" / "results.tar", "gpu.md")
    assert {file.name for file in (folder / "results").iterdir()} == {"gpu.md", "results.tar"}


def test_who_stops_it_stops_what_it_runs(tmp_path):
    bash = shutil.which("bash") or pytest.skip("there is no bash")
    environment = os.environ | stand_in(tmp_path)
    running = subprocess.Popen([bash, SUITE, tmp_path / "results"], env=environment, stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_until(lambda: pid.is_file() and pid.read_text())
    running.terminate()
    running.wait(timeout=30)
    wait_until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists())
    assert json.loads(in_archive(tmp_path / "results" / "results.tar", "figures.jsonl").splitlines()[0]) == FIGURE


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_rehearsal(tmp_path):
    for name in ("pytest_benchmark", "xdist"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    done = suite("--rehearse", tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    page = (tmp_path / "gpu.md").read_text()
    assert "* operators: done" in page and "|front_end|1|14x14|" in page and "FAILED" not in page
    assert "|1|50||" in page, "attention, by the kernels in Triton's interpreter"
    assert "|targets for an H200, measured on cpu|" in page and "|not measured|" in page
    assert "passed" in in_archive(tmp_path / "results.tar", "operators_timed.txt")
    if importlib.util.find_spec("timm"):
        assert "|20 %|1|ours|" in page and "CUDA graphs need a GPU" in page and "|launches|us|share|" in page
