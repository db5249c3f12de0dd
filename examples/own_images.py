"""A loop of your own, with images from timm's transform, as for any timm model.

python examples/own_images.py photo.jpg more/*.jpg [--model SPEC] [--guidance SPEC]
"""

import argparse

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import class_names, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--guidance", default="efficientformer_l1.snap_dist_in1k")
    args = parser.parse_args()

    model = load_model(args.model)
    # Use the target's size, mean and standard deviation, because the patched model converts images for the guidance
    # model by itself.
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in args.images])

    tdk.patch(model, guidance=args.guidance)
    with torch.inference_mode():
        confidence, predicted = model(images).softmax(dim=1).max(dim=1)
    names = class_names(model)
    for path, index, sure in zip(args.images, predicted.tolist(), confidence.tolist(), strict=True):
        print(f"{path}: {names[index]} ({sure:.0%})")


if __name__ == "__main__":
    main()
