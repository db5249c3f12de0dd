"""Classification of photographs with a Vision Transformer that drops tokens, and a report of what that saved.

python examples/quickstart.py photo.jpg more/*.jpg
python examples/quickstart.py photo.jpg --model NAME=weights.safetensors --guidance resnet18=small.safetensors
"""

import argparse

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--guidance", default="efficientformer_l1.snap_dist_in1k")
    args = parser.parse_args()

    model = load_model(args.model)
    tdk.patch(model, guidance=args.guidance)
    predictor = tdk.Predictor(model, batch_size=8, top=3)
    for row in predictor.predict(args.images):
        print(row.as_dict())
    print(predictor.report)


if __name__ == "__main__":
    main()
