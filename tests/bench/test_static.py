"""Tests of the compiled kernels without a GPU: nothing spills, and matrix products use tensor cores.

All configurations are compiled for sm_90, and one in three for other GPUs. With TINYDROP_ALL_BINARIES, all are compiled
for all GPUs. The kernels are compiled in other processes, because Triton decides on import whether kernels are
interpreted. They are compiled with the installed Triton, and with the oldest supported one if TINYDROP_TRITON36 names
its folder (bench/static.py says how to get it).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STATIC = Path(__file__).parents[2] / "bench" / "static.py"
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# The folder of each Triton, which is put first on the path. None is the installed Triton.
TRITONS = {"installed": None, "3.6": os.environ.get("TINYDROP_TRITON36")}
BUILDS = [*(("installed", capability) for capability in TENSOR_CORE), ("3.6", 90)]


@pytest.fixture(scope="module")
def binaries(tmp_path_factory):
    """Return the facts of every kernel binary, by (Triton, capability)."""
    pytest.importorskip("triton", reason="there is no Triton on this platform to compile with")
    folder = tmp_path_factory.mktemp("static")

    def start(version, capability):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # the default from Triton 3.10 on
        if TRITONS[version]:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (TRITONS[version], environment.get("PYTHONPATH"))))
        file = folder / f"{version} {capability}.json"
        every = "1" if capability == 90 or os.environ.get("TINYDROP_ALL_BINARIES") else "3"
        command = [sys.executable, STATIC, "--capabilities", str(capability), "--every", every, "--json", file]
        return file, subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    found = {}
    started = {build: start(*build) for build in BUILDS if build[0] == "installed" or TRITONS[build[0]]}
    for build, (file, process) in started.items():
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert build[0] == "installed" or f"triton {build[0]}" in output
        found[build] = json.loads(file.read_text())
    return found


@pytest.fixture(params=BUILDS, ids=lambda build: f"{build[0]}-sm_{build[1]}")
def build(request):
    if request.param[0] == "3.6" and not TRITONS["3.6"]:
        pytest.skip("TINYDROP_TRITON36 names no folder with Triton 3.6")
    return request.param


def test_nothing_spills(binaries, build):
    rows = binaries[build]
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "select_tokens_kernel",
        "select_from_saliency_kernel",
        "pack_kernel",
        "embed_tokens_kernel",
        "gather_tokens_kernel",
        "segment_pool_kernel",
        "varlen_attention_kernel",
    }
    assert [row for row in rows if row["spills"]] == []


def test_embedding_is_on_tensor_cores(binaries, build):
    rows = [row for row in binaries[build] if row["kernel"] == "embed_tokens_kernel"]
    half = [row for row in rows if not row["call"].startswith("float32")]
    assert half and all(TENSOR_CORE[build[1]] in row["tensor_core"] for row in half)


def test_attention_is_on_tensor_cores(binaries, build):
    """Tiles of 64 queries use the GPU's own tensor-core instructions. Smaller tiles can only use those of Ampere."""
    rows = [row for row in binaries[build] if row["kernel"] == "varlen_attention_kernel"]
    half = [row for row in rows if not row["call"].startswith("float32")]
    assert half and all(row["tensor_core"] for row in half)
    large = [row for row in half if "64 x 64" in row["call"] or "197 x 197" in row["call"]]
    assert large and all(TENSOR_CORE[build[1]] in row["tensor_core"] for row in large)


def test_multiplies_and_adds_are_fused(binaries, build):
    """Fusion does not depend on Triton's default."""
    assert all(row["fused"] for row in binaries[build])


def test_what_attention_issues(binaries, build):
    """A warp issues few instructions for 16 of 128 queries and 64 keys, counted on sm_90."""
    if build[1] != 90:
        pytest.skip("counted for sm_90 alone")
    rows = [row for row in binaries[build] if row["call"] == "bfloat16, 197 x 197, head 64"]
    assert len(rows) == 1 and rows[0]["tensor_core"] == ["HGMMA"]
    assert 200 < rows[0]["loop"] <= 300  # fewer would mean that another loop was counted
