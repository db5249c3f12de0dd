"""A guidance model of your own with an image size of your own, and two policies. The second policy only exits early.

python examples/custom_guidance.py photo.jpg [--model SPEC] [--guidance SPEC] [--size 160]

Any timm classifier with the target's classes can be the guidance model. With smaller images it costs less, but its
answers may get worse. Measure the accuracy on your own images.
"""

import argparse

import tinydrop_kernels as tdk
from tinydrop_kernels.checkpoints import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--model", default="vit_base_patch16_224.augreg2_in21k_ft_in1k")
    parser.add_argument("--guidance", default="mobilenetv3_large_100.ra_in1k")
    parser.add_argument("--size", type=int, default=160, help="side of the guidance model's images, in pixels")
    args = parser.parse_args()

    model = load_model(args.model)
    guidance = tdk.Guidance(load_model(args.guidance), input_size=(args.size, args.size))
    tdk.patch(model, guidance)
    for policy in (tdk.DropPolicy(tau=0.8, min_keep=0.25), tdk.DropPolicy.cascade(tau=0.8)):
        model.tinydrop.policy = policy  # the policy may be replaced between calls
        predictor = tdk.Predictor(model, batch_size=8)
        for row in predictor.predict(args.images):
            print(row.as_dict())
        print(policy, predictor.report, sep="\n")


if __name__ == "__main__":
    main()
