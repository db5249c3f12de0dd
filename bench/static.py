"""Registers, shared memory and spills of every kernel in every shipped configuration, compiled without a GPU.

    python bench/static.py [--every N] [--json FILE] [--table FILE] [--summary FILE [--beside JSON]]

Each operator's Triton implementation is called on CPU tensors of typical shapes, and its launches only compile. The
binaries therefore have the tiles, warps and argument specialisations of a real run. Registers and shared memory are
read from the binary. Spills, tensor-core instructions and the length of the longest loop are read from its disassembly.

To compare with another Triton, install it into a folder and put the folder first on the path. The summary then shows
its figures beside those of the installed Triton (``make static``):

    pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER python bench/static.py --json triton36.json
    python bench/static.py --summary bench/results/static.md --beside triton36.json
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tinydrop_kernels import ops
from tinydrop_kernels.ops.types import LEVELS

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAW = (0.8, 2.0, 0.25, 0.5)  # tau, gamma, min_keep, coarsen; the binary does not depend on them
TENSOR_CORE = r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCOMMA)\b"


class AbsentGpu:
    """The part of a Triton driver that compiling needs."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a number per capability, because Triton caches compiled kernels by device

    def get_current_stream(self, device=None) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[list]:
    """Make launches only compile within the ``with`` block. Yield the list of (kernel name, compiled kernel)."""
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
    """Return the resource usage and the instructions of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return usage.stdout + usage.stderr, code.stdout


def longest_loop(code: str) -> int:
    """Return the number of instructions that a warp issues in a usual iteration of the longest loop.

    A guarded forward branch is taken as a skip of code for rare iterations, such as attention's mask of the last block.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction.group(1))
    goals = {
        place: labels.get(branch.group(1), place)
        for place, instruction in enumerate(instructions)
        if (branch := re.search(r"\bBRA.*`\((\.L_\w+)\)", instruction))
    }
    start, end = max(
        ((goal, place) for place, goal in goals.items() if goal < place), key=lambda s: s[1] - s[0], default=(0, -1)
    )
    place, issued = start, 0
    while place <= end:
        issued += 1
        is_skip = instructions[place].startswith("@") and place < goals.get(place, 0) <= end
        place = goals[place] if is_skip else place + 1
    return issued


def facts(name: str, kernel) -> dict:
    """Return registers, shared memory, spills and tensor-core instructions of a compiled kernel."""
    usage, code = disassembled(kernel.asm["cubin"])
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return {
        "triton": triton.__version__,
        "kernel": name,
        "capability": kernel.metadata.target.arch,
        "warps": kernel.metadata.num_warps,
        "registers": int(registers),
        "shared_bytes": kernel.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),  # loads from and stores to local memory
        "fused": kernel.metadata.enable_fp_fusion,
        "loop": longest_loop(code),
        "tensor_core": sorted(set(re.findall(TENSOR_CORE, code))),
    }


def selected(batch: int, num_patches: int, keep: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, int]:
    """Return indices, cu_seqlens and the number of rows as the operators return them."""
    indices = torch.full((batch, num_patches), -1, dtype=torch.int32)
    indices[:, :keep] = torch.arange(keep)
    counts = torch.full((batch,), keep, dtype=torch.int32)
    packed, _ = ops.pack(counts, torch.zeros_like(counts), [(1, 1)], num_prefix_tokens)
    return indices, packed.cu_seqlens, packed.total


def levels_of(side: int) -> list[int]:
    """Return the grids of all levels of a ``side x side`` grid, as a flat list of rows and columns."""
    return [grid for share in LEVELS for grid in (int(side * share + 0.5),) * 2]


def select_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Yield calls with the usual shape in both layouts, the largest grid, and many channels.

    They use Grad-CAM alone and all parts of the saliency. Other combinations are tried at the largest grid only, which
    has the fewest registers to spare.
    """
    alone, every = (1, 0.0, 0.0), (5, 1.0, 1.0)
    between = ((1, 0.0, 1.0), (1, 1.0, 0.0), (5, 0.0, 0.0))
    for cells, channels, side, channels_last, tried in (
        (7, 448, 14, False, (alone, every)),
        (7, 448, 14, True, (alone, every)),
        (7, 448, 64, True, (alone, *between, every)),
        (7, 2048, 14, False, (every,)),
    ):
        features = torch.empty(8, channels, cells, cells, dtype=dtype).flatten(2).transpose(1, 2)
        features = features.contiguous() if channels_last else features
        arguments = (torch.empty(8, 1000, dtype=dtype), features, torch.empty(1000, channels, dtype=dtype))
        shape = f"{cells} x {cells} x {channels} to {side} x {side}, channels {'last' if channels_last else 'first'}"
        for parts in tried:
            note = "{} classes, norm {:g}, center {:g}".format(*parts)
            yield f"{shape}, {note}", (*arguments, (cells, cells), levels_of(side), *LAW, *parts)
        if side == 64:
            yield f"{shape}, one grid", (*arguments, (cells, cells), [side, side], *LAW, *alone)


def attention_calls(dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """Yield calls whose segments select each tile, with equal and with ragged lengths.

    Calls of attention pools have one query per segment and skip the prefix.
    """
    lengths = (16, 64, 197) if dtype == torch.float32 else (16, 32, 64, 128, 197)
    means = (8,) if dtype == torch.float32 else (8, 20, 50)
    for head_dim, queries, longest, mean in (
        *((head_dim, None, longest, longest) for head_dim in (64, 128) for longest in lengths),
        *((head_dim, None, 107, mean) for head_dim in (64, 128) for mean in means),
        (16, None, 197, 197),
        (72, None, 197, 197),
        (64, 1, 197, 197),
        (72, 1, 197, 197),
    ):
        for biased in (False, True) if queries is None else (False,):
            query, key, value = torch.empty(8 * mean, 3, 12, head_dim, dtype=dtype).unbind(1)
            cu_seqlens = torch.arange(0, 9 * mean, mean, dtype=torch.int32)
            bias = (torch.empty(732, 12, dtype=dtype), torch.zeros(8 * mean, dtype=torch.int32), (14, 14))
            ragged = f", mean {mean}" if mean < longest else ""
            shape = f"{queries or longest} x {longest}{ragged}, head {head_dim}{', bias' if biased else ''}"
            arguments = (query, key, value, cu_seqlens, cu_seqlens, queries or longest, longest, None)
            yield shape, (*arguments, *(bias if biased else (None, None, (1, 1))), int(queries is not None))


def calls() -> Iterator[tuple[str, str, tuple]]:
    """Yield (operator, description of the call, arguments) for every configuration that a launch can choose."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        if dtype != torch.float16:  # float16 compiles to the same binaries as bfloat16
            yield from (("select_tokens", f"{kind}, {shape}", given) for shape, given in select_calls(dtype))
            yield from (("varlen_attention", f"{kind}, {shape}", given) for shape, given in attention_calls(dtype))
        for side, grids in ((14, levels_of(14)), (64, levels_of(64)), (64, [64, 64])):
            arguments = (torch.empty(8, 1000, dtype=dtype), torch.empty(8, side, side, dtype=dtype))
            shape = f"{kind}, {side} x {side}, {len(grids) // 2} grids"
            yield "select_from_saliency", shape, (*arguments, grids, *LAW)
        for patch, side, dim, batch in (
            (16, 14, 768, 256),
            (16, 14, 768, 1),
            (14, 37, 384, 64),
            (32, 7, 768, 256),
            (8, 28, 192, 64),
        ):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                images = torch.empty(batch, 3, side * patch, side * patch, dtype=dtype, memory_format=memory_format)
                weight = torch.empty(dim, 3, patch, patch, dtype=dtype)
                parts = (
                    torch.empty(dim, dtype=dtype),
                    torch.empty(1, dim, dtype=dtype),
                    torch.empty(side**2, dim, dtype=dtype),
                )
                packing = selected(batch, side**2, side**2 // 4, 1)
                order = "channels last" if memory_format is torch.channels_last else "channels first"
                shape = f"{kind}, batch {batch}, patch {patch}, dim {dim}, {order}"
                yield "embed_tokens", shape, (images, weight, *parts, *packing)
        tokens, prefix = torch.empty(8, 196, 768, dtype=dtype), torch.empty(1, 768, dtype=dtype).expand(8, 1, 768)
        yield "gather_tokens", f"{kind}, dim 768", (tokens, prefix, *selected(8, 196, 49, 1))
        for mode in ("first", "mean", "max"):
            cu_seqlens = torch.arange(0, 9 * 50, 50, dtype=torch.int32)
            yield "segment_pool", f"{kind}, {mode}", (torch.empty(400, 768, dtype=dtype), cu_seqlens, mode, 0)
    counts = torch.ones(256, dtype=torch.int32)
    yield "pack", "", (counts, torch.zeros_like(counts), len(LEVELS), 1)


def inspect(capabilities=CAPABILITIES, only: str = "", every: int = 1) -> list[dict]:
    """Return the facts of every distinct binary, from one in ``every`` calls of each operator."""
    rows, seen = [], set()
    for capability in capabilities:
        met: Counter = Counter()
        for operator, shape, arguments in calls():
            met[operator] += 1
            if only not in operator or (met[operator] - 1) % every:
                continue
            kernel = next(i for i in ops.OPERATORS[operator].implementations if i.name == "triton")
            with compiling_for(capability) as compiled:
                kernel.run(*arguments)
            for name, binary in compiled:
                if (capability, binary.hash) not in seen:
                    seen.add((capability, binary.hash))
                    rows.append({"operator": operator, "call": shape, **facts(name, binary)})
    return rows


def table(rows: list[dict]) -> str:
    """Return a table with one row per binary."""
    lines = [
        f"# The kernels as compiled by triton {triton.__version__}",
        "",
        "| kernel | call | sm | warps | registers | shared KiB | spills | loop | tensor cores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['kernel']} | {row['call']} | {row['capability']} | {row['warps']} | {row['registers']} | "
            f"{row['shared_bytes'] / 1024:.1f} | {row['spills']} | {row['loop']} | {', '.join(row['tensor_core'])} |"
        )
    return "\n".join(lines) + "\n"


def condensed(rows: list[dict]) -> tuple[str, ...]:
    """Return the summary's cells for the binaries of one kernel."""
    least, most = (bound(row["registers"] for row in rows) for bound in (min, max))
    return (
        str(len(rows)),
        f"{least} to {most}" if least < most else str(most),
        f"{max(row['shared_bytes'] for row in rows) / 1024:.1f}",
        str(sum(row["spills"] for row in rows)),
        ", ".join(sorted({name for row in rows for name in row["tensor_core"]})) or "none",
    )


def summary(rows: list[dict]) -> str:
    """Return a table with one row per kernel and capability."""
    kernels, capabilities, versions = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("kernel", "capability", "triton")
    )
    names = " and ".join(versions)
    lines = [
        f"# The kernels as compiled by triton {names}",
        "",
        "Written by `make static`, which needs no GPU. Registers: range per thread. Shared memory: maximum per block.",
        "Spills: loads from and stores to local memory."
        + (f" Two values belong to {names}, in this order." if len(versions) > 1 else ""),
        "",
        "| kernel | sm | binaries | registers | shared KiB | spills | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for place in itertools.product(kernels, capabilities):
        own = [row for row in rows if (row["kernel"], row["capability"]) == place]
        by_version = [condensed(found) for v in versions if (found := [row for row in own if row["triton"] == v])]
        cells = (" / ".join(dict.fromkeys(values)) for values in zip(*by_version, strict=True))
        lines.append(f"| {place[0]} | {place[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--only", default="", help="only operators whose name contains this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="inspect one call in N of each operator")
    parser.add_argument("--json", type=Path, help="write the figures of every binary to this file")
    parser.add_argument("--table", type=Path, help="write the figures of every binary as a table")
    parser.add_argument("--summary", type=Path, help="write a table with one row per kernel and capability")
    parser.add_argument("--beside", type=Path, metavar="JSON", help="figures of another Triton for the summary")
    args = parser.parse_args()
    beside = json.loads(args.beside.read_text()) if args.beside else []
    rows = inspect(args.capabilities, args.only, args.every)
    if args.json:
        args.json.write_text(json.dumps(rows))
    if args.table:
        args.table.write_text(table(rows))
    if args.summary:
        args.summary.write_text(summary(rows + beside))
    spilling = [row for row in rows if row["spills"]]
    most = max(row["registers"] for row in rows)
    print(f"triton {triton.__version__}: {len(rows)} binaries, {len(spilling)} spill, at most {most} registers")
    for row in spilling:
        print(row)


if __name__ == "__main__":
    main()
