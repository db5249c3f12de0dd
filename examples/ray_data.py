"""Classification of many images on many workers with Ray Data (pip install "ray[data]"), one patched model per actor.

python examples/ray_data.py photos/ [--model SPEC] [--guidance SPEC] [--actors 1]
"""

import argparse

import numpy as np
import ray

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import load_model


class Classify:
    def __init__(self, model: str, guidance: str):
        patched = load_model(model)
        tdk.patch(patched, guidance=guidance)
        self.predictor = tdk.Predictor(patched, batch_size=32, top=1)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        # Images need not be copied or resized, because the predictor takes Ray's read-only arrays and any sizes.
        rows = self.predictor.predict_batch(batch["image"])
        best = [row.top[0] if row else None for row in rows]  # None if an image cannot be read
        return {
            "path": list(batch["path"]),
            "class": [candidate and candidate.name for candidate in best],
            "probability": [candidate and candidate.probability for candidate in best],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--guidance", default="efficientformer_l1.snap_dist_in1k")
    parser.add_argument("--actors", type=int, default=1)
    args = parser.parse_args()

    photographs = ray.data.read_images(args.images, mode="RGB", include_paths=True)
    rows = photographs.map_batches(
        Classify,
        fn_constructor_kwargs={"model": args.model, "guidance": args.guidance},
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        batch_size=32,
    )
    for row in rows.iter_rows():
        print(row)


if __name__ == "__main__":
    main()
