"""``bench/gpu.sh`` without a GPU: every step of it, on a few small cases."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[1] / "bench" / "gpu.sh"


def suite(*arguments, **variables):
    command = [shutil.which("bash") or pytest.skip("there is no bash"), SUITE, *arguments]
    # where pytest-xdist's variables are about, pytest-benchmark takes itself for one of many processes and times nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment = inherited | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_help_tells_what_is_written():
    done = suite("--help")
    assert done.returncode == 0 and "gpu.md" in done.stdout and "--rehearse" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = suite(tmp_path)
    assert done.returncode == 1 and "no CUDA GPU here" in done.stderr and not list(tmp_path.iterdir())


def test_rehearsal(tmp_path):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    done = suite("--rehearse", tmp_path)
    found = {file.name for file in tmp_path.iterdir()}
    log = (tmp_path / "gpu_bench.txt").read_text() if "gpu_bench.txt" in found else ""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:] + log[-2000:]
    assert found >= {"gpu.md", "gpu_tests.txt", "gpu.json", "gpu_attention.json", "gpu_compiled.json"}
    page = (tmp_path / "gpu.md").read_text()
    assert "operators: right" in page and "|front_end|1|14x14|" in page and "FAILED" not in page
    if importlib.util.find_spec("timm"):
        assert "|patched|eager|1|" in page and "CUDA graphs need a GPU" in page and "|launches|us|share|" in page
