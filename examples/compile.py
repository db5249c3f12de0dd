"""The time of a model dense, patched, and patched under ``torch.compile``.

python examples/compile.py [--model SPEC] [--guidance SPEC] [--batch-size 32] [--device cuda]
"""

import argparse
import time
from collections.abc import Callable

import torch

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import load_model


@torch.inference_mode()
def milliseconds(model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, rounds: int = 5) -> float:
    for turn in range(rounds + 2):
        if turn == 2:  # the first calls compile
            start = time.perf_counter()
        model(images).cpu()
    return 1e3 * (time.perf_counter() - start) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--guidance", default="efficientformer_l1.snap_dist_in1k")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = load_model(args.model).to(args.device)
    images = torch.randn(args.batch_size, 3, *model.patch_embed.img_size, device=args.device)
    print(f"dense: {milliseconds(model, images):.1f} ms")
    tdk.patch(model, args.guidance, tdk.DropPolicy.fixed(0.5))  # without exits, because noise would exit by chance
    print(f"patched: {milliseconds(model, images):.1f} ms")
    print(f"patched and compiled: {milliseconds(torch.compile(model), images):.1f} ms")
    tdk.unpatch(model)  # takes the model itself, not the wrapper from torch.compile


if __name__ == "__main__":
    main()
