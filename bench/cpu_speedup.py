"""Wall clock on CPU: a stock-size ViT dense and patched, in turn, on the same images, guidance counted.

    python bench/cpu_speedup.py [--model NAME] [--batch-sizes 1 8 32] [--policy mixed] [--json FILE]

Weights are random, which with no exits and a fixed keep ratio does not change the time. The mixed policy spends by the
guidance's confidence, so there each round's confidences are set: evenly spread from 0 to 1. The figure to beat is
the ratio of the FLOPs, dense over patched.
"""

import argparse
import json
import statistics
import time
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import tinydrop_kernels as tdk

ROUND = 32  # images of a round, in as many batches as that takes
# Half of the images exit, the others have grids of every level with drops on top. No second look: random weights are
# never sure, so that all images would go through dense after all.
MIXED = tdk.DropPolicy(0.5, 1.0, 0.25, coarsen=0.6, blend=0.2, second_look=None)


def spread_confidences(model: Any, batches: int) -> None:
    """Have the guidance answer with the confidences 0.5 / n, 1.5 / n, ... over so many batches, then again."""
    turn = 0

    def spread(guidance: Any, arguments: Any, guided: Any) -> Any:
        nonlocal turn
        images, classes = guided.logits.shape
        # Each batch has some of all, not the next few.
        confidence = (torch.arange(images) * batches + turn % batches + 0.5) / (images * batches)
        turn += 1
        logits = torch.zeros_like(guided.logits)
        logits[:, 0] = torch.log(confidence.clamp(min=1 / classes) * (classes - 1) / (1 - confidence))
        return guided._replace(logits=logits)

    model.tinydrop.guidance.register_forward_hook(spread)


def time_of(function: Any, images: Tensor) -> float:
    start = time.perf_counter()
    function(images)
    return time.perf_counter() - start


def figures_of(patched: Any, batch_size: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, in each of which dense and patched take turns batch by batch."""
    tinydrop = patched.tinydrop
    batches = torch.randn(max(1, ROUND // batch_size), batch_size, 3, *patched.patch_embed.img_size)
    seconds: dict[str, list[float]] = {"dense": [], "patched": []}
    reports = []
    for turn in range(rounds + 1):  # the first warms up
        taken = {"dense": 0.0, "patched": 0.0}
        for images in batches:
            taken["dense"] += time_of(tinydrop.dense, images)
            taken["patched"] += time_of(patched, images)
            if turn:
                reports.append(tinydrop.report())
        for name in seconds if turn else ():
            seconds[name].append(taken[name] / len(batches))
    report = reduce(add, reports)
    ratio = report.dense_flops / report.flops
    speed_up = statistics.median(d / p for d, p in zip(*seconds.values(), strict=True))
    return {
        "batch_size": batch_size,
        "dense_ms": round(1e3 * statistics.median(seconds["dense"]), 1),
        "patched_ms": round(1e3 * statistics.median(seconds["patched"]), 1),
        "stages_ms": {stage: round(1e3 * spent / len(reports), 1) for stage, spent in report.seconds.items()},
        "exits": f"{report.exits / report.images:.1%}",
        "kept_patches": "none stayed" if not report.patches else f"{report.mean_keep:.1%}",
        "flops_ratio": round(ratio, 3),
        "speed_up": round(speed_up, 3),
        "speed_up_over_flops_ratio": round(speed_up / ratio, 3),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--guidance", default="efficientformer_l1")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--policy", choices=("fixed", "mixed"), default="fixed")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="of the fixed policy")
    parser.add_argument("--coarsen", type=float, default=0.0, help="of the fixed policy: the grid's share of the cut")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--bar", type=float, help="fail if a speed-up is less than so much of the FLOPs ratio")
    args = parser.parse_args()

    torch.manual_seed(0)
    fixed = tdk.DropPolicy.fixed(args.keep_ratio, coarsen=args.coarsen)
    policy = fixed if args.policy == "fixed" else MIXED
    setting = {
        "model": args.model,
        "guidance": args.guidance,
        "policy": str(policy),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    found = []
    for batch_size in args.batch_sizes:
        patched = tdk.patch(timm.create_model(args.model).eval(), timm.create_model(args.guidance), policy)
        patched.tinydrop.timed = True
        if args.policy == "mixed":
            spread_confidences(patched, max(1, ROUND // batch_size))
        found.append(setting | figures_of(patched, batch_size, args.rounds))
        for name, figure in found[-1].items():
            print(f"{name:28s}{figure}")
        print(flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.bar and any(figures["speed_up_over_flops_ratio"] < args.bar for figures in found):
        parser.exit(1, f"a speed-up is below {args.bar} of the FLOPs ratio\n")


if __name__ == "__main__":
    main()
