"""Speed-up on CPU of a stock-size ViT: the dense and the patched model take turns on the same images.

    python bench/cpu_speedup.py [--model NAME] [--batch-sizes 1 8 32] [--policy mixed] [--dtype auto] [--compile]
        [--prepack] [--guidance-size 160] [--busy 3] [--process-time] [--json FILE]

The time of the patched model includes the guidance model. Weights are random. Random weights do not change the time
of a fixed keep ratio without exits. The mixed policy depends on the guidance model's confidences, so they are replaced
by values evenly spread from 0 to 1. The speed-up is compared with the ratio of dense to patched FLOPs.

With ``--compile`` the patched model is compiled, and its rival is the faster of eager and compiled dense. ``--busy``
runs other processes that compete for the cores. ``--process-time`` measures the CPU time of this process, which with
one thread is meaningful on a shared machine too.
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

ROUND = 32  # images per round, in one or more batches
# Half of the images exit. The other half spreads over all levels, with drops. There is no second look, because random
# weights are never confident and every image would go through the dense target.
MIXED = tdk.DropPolicy(0.5, 1.0, 0.25, coarsen=0.6, blend=0.2, second_look=None)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep this many other processes computing within the ``with`` block."""
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
    """Return medians over the rounds. In each round, all models take turns batch by batch.

    The speed-up is over the fastest dense model.
    """
    weight = next(patched.parameters())
    batches = torch.randn(max(1, ROUND // batch_size), batch_size, 3, *patched.patch_embed.img_size).to(weight.dtype)
    models = dense | {"patched": patched}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    reports = []
    for turn in range(rounds + 1):  # the first round warms up
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
        "kept_patches": "all images exited" if not report.patches else f"{report.mean_keep:.1%}",
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
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="keep ratio of the fixed policy")
    parser.add_argument("--coarsen", type=float, default=0.0, help="coarsen of the fixed policy")
    parser.add_argument("--guidance-size", type=int, help="input size of the guidance model, if not its own")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--prepack", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="number of other processes that compete for the cores")
    parser.add_argument("--process-time", action="store_true", help="measure CPU time of this process; for one thread")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--bar", type=float, help="fail if a speed-up is less than this fraction of the FLOPs ratio")
    args = parser.parse_args()

    torch.manual_seed(0)
    fixed = tdk.DropPolicy.fixed(args.keep_ratio, coarsen=args.coarsen)
    policy = fixed if args.policy == "fixed" else MIXED
    dtype = fast_dtype("cpu") if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.process_time and torch.get_num_threads() > 1:
        parser.error("--process-time: spinning threads count as CPU time; set OMP_NUM_THREADS=1")
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
