"""Whole models, dense and patched, guidance counted: eager, in a CUDA graph, compiled; and where a forward's time goes.

    python bench/models.py --json FILE [--modes eager graphed compiled] [--profile] [--deadline SECONDS]
    python bench/models.py --show FILE [FILE ...]

Random weights and a fixed fraction of the patches, so that every batch costs alike; at batch 1 also an image that
exits. Batch 1 and eager come first. Each case is written to FILE as soon as it is measured, and one that fails, or has
not begun by the deadline, says so in its row. On CPU a small model in small batches: to see that the command works.

Columns: milliseconds of a call until its end (median and 99th percentile), and images a second of calls behind one
another; milliseconds of host time; launches of a call (on CPU: operators), and the peak of its memory beyond weights
and images; and dense over patched in the same mode, beside dense FLOPs over patched, the most that it could be.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from measure import CUDA, DEVICE, DTYPE, clock_mhz, spin, synchronize
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tinydrop_kernels as tdk

MODEL, BATCHES = ("vit_large_patch16_224", (1, 8, 64, 256)) if CUDA else ("vit_tiny_patch16_224", (1, 2))
GUIDANCE = "efficientformer_l1"
POLICIES = {"patched": tdk.DropPolicy.fixed(0.2), "exits": tdk.DropPolicy.cascade(1e-6)}
MODES = ("eager", "graphed", "compiled")
SECONDS = 1.0 if CUDA else 0.1  # of calls, for each case
COLUMNS = ("model", "mode", "batch", "p50 ms", "p99 ms", "images/s", "host ms", "launches", "GB", "x dense", "x FLOPs")


@functools.cache
def make(name: str, mode: str) -> Callable[[Tensor], Tensor]:
    """A model to call; "exits" is patched, and everything exits."""
    if name != "dense" and mode == "graphed":
        raise NotImplementedError("a patched model reads back within a call, which no graph can hold")
    torch.manual_seed(0)
    with torch.device(DEVICE), torch.inference_mode(False):  # random weights take a CPU seconds
        model, guidance = timm.create_model(MODEL).eval().to(DTYPE), timm.create_model(GUIDANCE)
    if name != "dense":
        return tdk.patch(model, guidance, POLICIES[name], **({"compile": True} if mode == "compiled" else {}))
    return torch.compile(model, dynamic=False) if mode == "compiled" else model


def graphed(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """A replay on whatever lies in ``images``."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(images)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return out

    return replay


def profiled(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Of each kernel of a call, or of each operator on CPU: name, launches and microseconds; the longest first."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as found:
        call()
        synchronize()
    name = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [(event.key, event.count, float(getattr(event, name))) for event in found.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def figures_of(model: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Any]:
    def call() -> Tensor:
        return model(images)

    for _ in range(3):
        call()
    spin()
    clocks = [clock_mhz() if CUDA else None]
    held = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    waited: list[float] = []
    while len(waited) < 5 or (len(waited) < 100 and sum(waited) < SECONDS):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        waited.append(time.perf_counter() - start)
    calls = max(2, min(50, int(SECONDS / statistics.median(waited))))
    start = time.perf_counter()
    for _ in range(calls):
        call()
    host = time.perf_counter() - start
    synchronize()
    whole = time.perf_counter() - start
    return {
        "p50_ms": 1e3 * statistics.median(waited),
        "p99_ms": 1e3 * sorted(waited)[int(0.99 * len(waited))],
        "images_per_s": calls * len(images) / whole,
        "host_ms": 1e3 * host / calls,
        "launches": sum(count for _, count, _ in profiled(call)),
        "gb": (torch.cuda.max_memory_allocated() - held) / 1e9 if CUDA else None,
        "clock_mhz": [*clocks, clock_mhz() if CUDA else None],
    }


def measure(name: str, mode: str, batch: int) -> dict[str, Any]:
    model = make(name, mode)
    config = timm.data.resolve_data_config(model=getattr(model, "_orig_mod", model))
    images = torch.randn(batch, *config["input_size"], device=DEVICE, dtype=DTYPE)
    for _ in range(3):
        model(images)
    called = graphed(model, images) if mode == "graphed" else model
    found = figures_of(called, images)
    if name != "dense":
        report = model.tinydrop.report()
        found["flops_ratio"] = report.dense_flops / report.flops
    return found


def cases(modes: list[str]) -> list[tuple[str, str, int]]:
    found = []
    # Compiling takes longer than all the rest: the batches that the bars are of come first.
    batches = {"compiled": (BATCHES[0], BATCHES[-1], *BATCHES[1:-1])}
    for mode in modes:
        for batch in batches.get(mode, BATCHES):
            names = ("dense", "patched", "exits") if batch == 1 else ("dense", "patched")
            found += [(name, mode, batch) for name in names]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    dense = {(row["mode"], row["batch"]): row for row in rows if row["model"] == "dense"}
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    for row in rows:
        cells = (row["model"], row["mode"], str(row["batch"]))
        if "why_not" in row:
            lines.append((*cells, f"not measured: {row['why_not']}", *[""] * (len(COLUMNS) - 4)))
            continue
        figures = (row["p50_ms"], row["p99_ms"], row["images_per_s"], row["host_ms"])
        rival = dense.get((row["mode"], row["batch"]), {}).get("images_per_s")
        ratio = row["images_per_s"] / rival if rival and row["model"] != "dense" else None
        lines.append(
            (
                *cells,
                *(number(figure, ".2f") for figure in figures),
                str(row["launches"]),
                number(row["gb"], ".2f"),
                number(ratio, ".2f"),
                number(row.get("flops_ratio"), ".2f"),
            )
        )
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def profiles_of(batch: int) -> dict[str, list[tuple[str, int, float]]]:
    """Of a forward, dense and patched, eager."""
    found = {}
    for name in ("dense", "patched"):
        model, images = make(name, "eager"), torch.randn(batch, 3, 224, 224, device=DEVICE, dtype=DTYPE)
        for _ in range(3):
            model(images)
        found[name] = profiled(lambda model=model, images=images: model(images))
    return found


def profile_table(name: str, rows: list[tuple[str, int, float]], longest: int = 12) -> str:
    whole = sum(us for _, _, us in rows)
    lines = [f"|{name}: {whole / 1e3:.2f} ms, {sum(count for _, count, _ in rows)} launches|launches|us|share|"]
    lines.append("|---|---|---|---|")
    lines += [f"|`{key[:80]}`|{count}|{us:.0f}|{us / whole:.1%}|" for key, count, us in rows[:longest]]
    return "\n".join(lines).replace("||", "|")


def shown(found: dict[str, Any]) -> str:
    clocks = [mhz for row in found["cases"] for mhz in row.get("clock_mhz", ()) if mhz]
    clock = f"; clock {min(clocks)} to {max(clocks)} MHz" if clocks else ""
    profiles = [profile_table(name, rows) for name, rows in found["profile"].items()]
    return "\n\n".join((f"{found['what']}, a fifth of the patches kept{clock}", table(found["cases"]), *profiles))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    to_do = parser.add_mutually_exclusive_group(required=True)
    to_do.add_argument("--json", type=Path, metavar="FILE", help="measure, and write figures there")
    to_do.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print figures as tables")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--profile", action="store_true", help="each kernel's share of a forward of the largest batch")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="in seconds, for a case to begin")
    args = parser.parse_args()
    if args.show:
        print(*(shown(json.loads(file.read_text())) for file in args.show), sep="\n\n")
        return
    started, rows, profiles = time.monotonic(), [], {}
    found = {"what": f"{MODEL} guided by {GUIDANCE}, {DTYPE}, {DEVICE}", "cases": rows, "profile": profiles}
    for name, mode, batch in cases(args.modes):
        row: dict[str, Any] = {"model": name, "mode": mode, "batch": batch}
        if time.monotonic() - started > args.deadline:
            row["why_not"] = "the deadline came"
        elif mode == "graphed" and not CUDA:
            row["why_not"] = "CUDA graphs need a GPU"
        else:
            try:
                row |= measure(name, mode, batch)
            except Exception as error:  # one case's, not the others'
                row["why_not"] = f"{type(error).__name__}: {error}".split("\n")[0][:100]
        if CUDA:
            torch.cuda.empty_cache()
        rows.append(row)
        args.json.write_text(json.dumps(found))
    if args.profile and time.monotonic() - started <= args.deadline:
        profiles |= {f"{name}, batch {BATCHES[-1]}": rows for name, rows in profiles_of(BATCHES[-1]).items()}
        args.json.write_text(json.dumps(found))
    print(shown(found))


if __name__ == "__main__":
    main()
