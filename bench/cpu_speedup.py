"""Wall clock on CPU: a stock-size ViT dense and patched, in turn, on the same batch, guidance counted.

    python bench/cpu_speedup.py [--model NAME] [--batch-size 32] [--keep-ratio 0.25] [--json FILE]

Weights are random: with no exits and a fixed keep ratio they do not change the time. The figure to beat is the ratio
of the FLOPs, dense over patched.
"""

import argparse
import json
import statistics
import time

import timm
import torch

import tinydrop_kernels as tdk


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--guidance", default="efficientformer_l1")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--bar", type=float, help="fail if the speed-up is less than so much of the FLOPs ratio")
    args = parser.parse_args()

    torch.manual_seed(0)
    dense = timm.create_model(args.model).eval()
    patched = timm.create_model(args.model).eval()
    patched.load_state_dict(dense.state_dict())
    tdk.patch(patched, timm.create_model(args.guidance), tdk.DropPolicy.fixed(args.keep_ratio))
    patched.tinydrop.timed = True
    size = dense.patch_embed.img_size
    images = torch.randn(args.batch_size, 3, *size)

    seconds: dict[str, list[float]] = {"dense": [], "patched": []}
    stages: list[dict[str, float]] = []
    for turn in range(args.rounds + 1):  # the first turn warms up
        for name, model in (("dense", dense), ("patched", patched)):
            start = time.perf_counter()
            model(images)
            if turn:
                seconds[name].append(time.perf_counter() - start)
        if turn:
            stages.append(patched.tinydrop.last.seconds)
    report = patched.tinydrop.report()
    ratio = report.dense_flops / report.flops
    speed_up = statistics.median(d / p for d, p in zip(*seconds.values(), strict=True))
    figures = {
        "model": args.model,
        "guidance": args.guidance,
        "batch_size": args.batch_size,
        "keep_ratio": args.keep_ratio,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "dense_ms": round(1e3 * statistics.median(seconds["dense"]), 1),
        "patched_ms": round(1e3 * statistics.median(seconds["patched"]), 1),
        "stages_ms": {s: round(1e3 * statistics.median(t[s] for t in stages), 1) for s in stages[0]},
        "flops_ratio": round(ratio, 3),
        "speed_up": round(speed_up, 3),
        "speed_up_over_flops_ratio": round(speed_up / ratio, 3),
    }
    for name, figure in figures.items():
        print(f"{name:28s}{figure}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=2)
            file.write("\n")
    if args.bar and speed_up < args.bar * ratio:
        parser.exit(1, f"the speed-up is below {args.bar} of the FLOPs ratio\n")


if __name__ == "__main__":
    main()
