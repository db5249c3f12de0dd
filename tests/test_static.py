"""Every configuration shipped, compiled for GPUs that are not here: no spills, and tensor cores where they belong.

In processes of its own, because Triton decides when it is imported whether kernels are interpreted or compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STATIC = Path(__file__).parents[1] / "bench" / "static.py"
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
REGISTERS = 255  # of a thread, on every architecture since sm_35


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """Facts of every kernel binary, by capability."""
    pytest.importorskip("triton", reason="there is no Triton on this platform to compile with")
    folder = tmp_path_factory.mktemp("static")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def start(capability):
        file = folder / f"{capability}.json"
        command = [sys.executable, STATIC, "--capabilities", str(capability), "--json", file]
        return file, subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    found = {}
    for capability, (file, process) in {capability: start(capability) for capability in TENSOR_CORE}.items():
        output, _ = process.communicate()
        assert process.returncode == 0, output
        found[capability] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("capability", TENSOR_CORE)
def test_nothing_spills(binaries, capability):
    rows = binaries[capability]
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "select_tokens_kernel",
        "select_from_saliency_kernel",
        "pack_kernel",
        "embed_tokens_kernel",
        "mean_patch_kernel",
        "gather_tokens_kernel",
        "segment_pool_kernel",
    }
    assert [row for row in rows if row["spills"]] == []
    assert max(row["registers"] for row in rows) <= REGISTERS


@pytest.mark.parametrize("capability", TENSOR_CORE)
def test_embedding_is_on_tensor_cores(binaries, capability):
    rows = [row for row in binaries[capability] if row["kernel"] == "embed_tokens_kernel"]
    half = [row for row in rows if not row["call"].startswith("float32")]
    assert half and all(TENSOR_CORE[capability] in row["tensor_core"] for row in half)
