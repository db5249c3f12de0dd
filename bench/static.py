"""What the compiler made of every kernel in every configuration shipped, for GPUs that need not be here.

    python bench/static.py [--json FILE] [--markdown bench/results/static.md]

Each operator's own ``launch`` is called on CPU tensors of typical shapes, with launches turned into compilations, so
that what is inspected is exactly what would run: the same tiles, warps and argument specialisations. Registers and
shared memory come from the binary, spills and tensor-core instructions from its disassembly.

Another Triton needs no environment of its own, only a folder that comes first on the path:

    pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER python bench/static.py --markdown bench/results/static_triton36.md
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tinydrop_kernels import ops

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCOMMA)\b"


class AbsentGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device=None) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[list]:
    """Within the block launches only compile; yields the list of (kernel name, compiled kernel)."""
    compiled: list = []

    def compile_only(function: JITFunction, grid):
        def run(*args, **kwargs):
            compiled.append((function.fn.__name__, function.run(*args, grid=grid, warmup=True, **kwargs)))

        return run

    launch = JITFunction.__getitem__
    JITFunction.__getitem__ = compile_only
    driver.set_active(AbsentGpu(capability))
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = launch


def disassembled(cubin: bytes) -> tuple[str, str]:
    """Resource usage and instructions of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return usage.stdout + usage.stderr, code.stdout


def facts(name: str, kernel) -> dict:
    """Registers, shared memory, spills and tensor-core instructions of a compiled kernel."""
    usage, code = disassembled(kernel.asm["cubin"])
    return {
        "kernel": name,
        "capability": kernel.metadata.target.arch,
        "warps": kernel.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "shared_bytes": kernel.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),  # loads from and stores to local memory
        "tensor_core": sorted(set(re.findall(TENSOR_CORE, code))),
    }


def selected(batch: int, num_patches: int, keep: int, num_prefix_tokens: int, summary: bool):
    """Indices and packing as the front end would hand them on."""
    indices = torch.full((batch, num_patches), -1, dtype=torch.int32)
    indices[:, :keep] = torch.arange(keep)
    counts = torch.full((batch,), keep, dtype=torch.int32)
    cu_seqlens, _, total = ops.pack(counts, num_patches, num_prefix_tokens, summary)
    return indices, cu_seqlens, total


def attention_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Segments that take each of the tiles; and attention pools', of one query each."""
    lengths = (16, 64, 197) if dtype == torch.float32 else (16, 32, 64, 128, 197)
    for head_dim, queries, longest in (
        *((head_dim, None, longest) for head_dim in (64, 128) for longest in lengths),
        (16, None, 197),
        (72, None, 197),
        (64, 1, 197),
        (72, 1, 197),
    ):
        for biased in (False, True) if queries is None else (False,):
            query, key, value = torch.empty(8 * longest, 3, 12, head_dim, dtype=dtype).unbind(1)
            cu_seqlens = torch.arange(0, 9 * longest, longest, dtype=torch.int32)
            bias = (torch.empty(732, 12, dtype=dtype), torch.zeros(8 * longest, dtype=torch.int32), (14, 14))
            shape = f"{queries or longest} x {longest}, head {head_dim}{', bias' if biased else ''}"
            arguments = (query, key, value, cu_seqlens, cu_seqlens, queries or longest, longest, None)
            yield shape, (*arguments, *(bias if biased else ()))


def calls() -> Iterator[tuple[str, str, tuple]]:
    """(operator, what is special about the call, arguments) for every configuration that a launch can choose."""
    law = (0.8, 2.0, 0.25)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for cells, channels, side in ((7, 448, 14), (5, 1280, 37), (7, 448, 64), (16, 64, 24)):
            features = torch.empty(8, channels, cells, cells, dtype=dtype).flatten(2).transpose(1, 2)
            for layout, given in (("channels first", features), ("channels last", features.contiguous())):
                shape = f"{kind}, {cells} x {cells} x {channels} to {side} x {side}, {layout}"
                arguments = (torch.empty(8, 1000, dtype=dtype), given, torch.empty(1000, channels, dtype=dtype))
                yield "select_tokens", shape, (*arguments, (cells, cells), (side, side), *law)
                if side == 64:  # normalising takes registers, of which this grid has the fewest to spare
                    yield "select_tokens", f"{shape}, normalised", (*arguments, (cells, cells), (64, 64), *law, True)
        for side, normalise, note in ((14, False, ""), (64, True, ", normalised")):
            arguments = (torch.empty(8, 1000, dtype=dtype), torch.empty(8, side, side, dtype=dtype))
            shape = f"{kind}, {side} x {side}{note}"
            yield "select_from_saliency", shape, (*arguments, (side, side), *law, normalise)
        for patch, side, dim, batch in (
            (16, 14, 768, 256),
            (16, 14, 768, 1),
            (14, 37, 384, 64),
            (32, 7, 768, 256),
            (8, 28, 192, 64),
        ):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                for summary in (False, True):
                    images = torch.empty(batch, 3, side * patch, side * patch, dtype=dtype, memory_format=memory_format)
                    weight = torch.empty(dim, 3, patch, patch, dtype=dtype)
                    parts = (
                        torch.empty(dim, dtype=dtype),
                        torch.empty(1, dim, dtype=dtype),
                        torch.empty(side**2, dim, dtype=dtype),
                    )
                    packing = selected(batch, side**2, side**2 // 4, 1, summary)
                    order = "channels last" if memory_format is torch.channels_last else "channels first"
                    shape = f"{kind}, batch {batch}, patch {patch}, dim {dim}, {order}{', summary' if summary else ''}"
                    yield "embed_tokens", shape, (images, weight, *parts, *packing, summary)
        for summary in (False, True):
            tokens, prefix = torch.empty(8, 196, 768, dtype=dtype), torch.empty(1, 768, dtype=dtype)
            packing = selected(8, 196, 49, 1, summary)
            shape = f"{kind}, dim 768{', summary' if summary else ''}"
            yield "gather_tokens", shape, (tokens, prefix, torch.empty(196, 768, dtype=dtype), *packing, summary)
        if dtype != torch.float16:  # compiles as bfloat16 does
            yield from (("varlen_attention", f"{kind}, {shape}", given) for shape, given in attention_calls(dtype))
        for mode in ("first", "mean", "max"):
            cu_seqlens = torch.arange(0, 9 * 50, 50, dtype=torch.int32)
            yield "segment_pool", f"{kind}, {mode}", (torch.empty(400, 768, dtype=dtype), cu_seqlens, mode, 0)
    yield "pack", "", (torch.ones(256, dtype=torch.int32), 196, 1, True)


def inspect(capabilities=CAPABILITIES, only: str = "") -> list[dict]:
    """Facts of every distinct binary."""
    rows, seen = [], set()
    for capability in capabilities:
        for operator, shape, arguments in calls():
            if only not in operator:
                continue
            launch = importlib.import_module(f"tinydrop_kernels.ops.kernels.{operator}").launch
            with compiling_for(capability) as compiled:
                launch(*arguments)
            for name, kernel in compiled:
                if (capability, kernel.hash) not in seen:
                    seen.add((capability, kernel.hash))
                    rows.append({"operator": operator, "call": shape, **facts(name, kernel)})
    return rows


def as_markdown(rows: list[dict]) -> str:
    lines = [
        f"# What triton {triton.__version__} made of the kernels",
        "",
        "By `bench/static.py`, which says how; no GPU needed. Spills are counted in loads and stores of local memory.",
        "",
        "| kernel | call | sm | warps | registers | shared KiB | spills | tensor cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['kernel']} | {row['call']} | {row['capability']} | {row['warps']} | {row['registers']} | "
            f"{row['shared_bytes'] / 1024:.1f} | {row['spills']} | {', '.join(row['tensor_core'])} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--only", default="", help="operators whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    rows = inspect(args.capabilities, args.only)
    if args.json:
        args.json.write_text(json.dumps(rows))
    if args.markdown:
        args.markdown.write_text(as_markdown(rows))
    spilling = [row for row in rows if row["spills"]]
    most = max(row["registers"] for row in rows)
    print(f"triton {triton.__version__}: {len(rows)} binaries, {len(spilling)} spill, at most {most} registers")
    for row in spilling:
        print(row)


if __name__ == "__main__":
    main()
