"""Wall clock on CPU: a stock-size ViT dense and patched, in turn, on the same images, guidance counted.

    python bench/cpu_speedup.py [--model NAME] [--batch-sizes 1 8 32] [--policy mixed] [--dtype auto] [--compile]
        [--prepack] [--guidance-size 160] [--busy 3] [--process-time] [--json FILE]

Weights are random, which with no exits and a fixed keep ratio does not change the time. The mixed policy spends by the
guidance's confidence, so there each round's confidences are set: evenly spread from 0 to 1. The figure to beat is
the ratio of the FLOPs, dense over patched. With ``--compile`` the patched model is compiled and its rival the faster of
eager and compiled dense. ``--busy`` has other processes want the cores meanwhile. ``--process-time`` counts the time
that the process ran, not the clock's: with one thread that is what it takes on a machine that is shared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import timm
import torch
from mixes import SpreadConfidences

import tinydrop_kernels as tdk
from tinydrop_kernels.cli.options import fast_dtype

ROUND = 32  # images of a round, in as many batches as that takes
# Half of the images exit, the others have grids of every level with drops on top. No second look: random weights are
# never sure, so that all images would go through dense after all.
MIXED = tdk.DropPolicy(0.5, 1.0, 0.25, coarsen=0.6, blend=0.2, second_look=None)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many other processes that do nothing but compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@torch.inference_mode()
def figures_of(
    patched: Any,
    dense: dict[str, Any],
    batch_size: int,
    rounds: int,
    clock: Callable[[], float],
    confidences: SpreadConfidences | None,
) -> dict[str, Any]:
    """Medians over the rounds, in each of which all take turns batch by batch; the rival is the faster dense one."""
    weight = next(patched.parameters())
    batches = torch.randn(max(1, ROUND // batch_size), batch_size, 3, *patched.patch_embed.img_size).to(weight.dtype)
    models = dense | {"patched": patched}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    reports = []
    for turn in range(rounds + 1):  # the first warms up
        taken = dict.fromkeys(models, 0.0)
        for number, images in enumerate(batches):
            if confidences is not None:
                confidences.turn_to(number)
            for name, model in models.items():
                start = clock()
                model(images)
                taken[name] += clock() - start
            if turn:
                reports.append(patched.tinydrop.report())
        for name in seconds if turn else ():
            seconds[name].append(taken[name] / len(batches))
    report = reduce(add, reports)
    ratio = report.dense_flops / report.flops
    rival = min(dense, key=lambda name: statistics.median(seconds[name]))
    speed_up = statistics.median(d / p for d, p in zip(seconds[rival], seconds["patched"], strict=True))
    return {
        "batch_size": batch_size,
        **{f"{name}_ms": round(1e3 * statistics.median(times), 1) for name, times in seconds.items()},
        "stages_ms": {stage: round(1e3 * spent / len(reports), 1) for stage, spent in report.seconds.items()},
        "exits": f"{report.exits / report.images:.1%}",
        "kept_patches": "none stayed" if not report.patches else f"{report.mean_keep:.1%}",
        "flops_ratio": round(ratio, 3),
        "speed_up": round(speed_up, 3),
        "speed_up_over_flops_ratio": round(speed_up / ratio, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--guidance", default="efficientformer_l1")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--policy", choices=("fixed", "mixed"), default="fixed")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="of the fixed policy")
    parser.add_argument("--coarsen", type=float, default=0.0, help="of the fixed policy: the grid's share of the cut")
    parser.add_argument("--guidance-size", type=int, help="of its images, if not its own")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--prepack", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="other processes that want the cores")
    parser.add_argument("--process-time", action="store_true", help="count the time this process ran; for one thread")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--bar", type=float, help="fail if a speed-up is less than so much of the FLOPs ratio")
    args = parser.parse_args()

    torch.manual_seed(0)
    fixed = tdk.DropPolicy.fixed(args.keep_ratio, coarsen=args.coarsen)
    policy = fixed if args.policy == "fixed" else MIXED
    dtype = fast_dtype("cpu") if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.process_time and torch.get_num_threads() > 1:
        parser.error("--process-time: threads that spin count as running; set OMP_NUM_THREADS=1")
    setting = {
        "model": args.model,
        "guidance": args.guidance,
        "guidance_size": args.guidance_size,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": args.compile,
        "prepacked": args.prepack,
        "busy_processes": args.busy,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "clock": "process" if args.process_time else "wall",
        "policy": str(policy),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    found = []
    for batch_size in args.batch_sizes:
        patched = tdk.patch(
            timm.create_model(args.model).eval(),
            timm.create_model(args.guidance),
            policy,
            guidance_size=args.guidance_size,
            compile=args.compile,
            prepack=args.prepack,
        ).to(dtype)
        patched.tinydrop.timed = True
        plain = timm.create_model(args.model).eval().to(dtype)
        dense = {"dense": plain} | ({"dense_compiled": torch.compile(plain)} if args.compile else {})
        confidences = SpreadConfidences(patched, ROUND) if args.policy == "mixed" else None
        clock = time.process_time if args.process_time else time.perf_counter
        with busy(args.busy):
            found.append(setting | figures_of(patched, dense, batch_size, args.rounds, clock, confidences))
        for name, figure in found[-1].items():
            print(f"{name:28s}{figure}")
        print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.bar and any(figures["speed_up_over_flops_ratio"] < args.bar for figures in found):
        parser.exit(1, f"a speed-up is below {args.bar} of the FLOPs ratio\n")


if __name__ == "__main__":
    main()
