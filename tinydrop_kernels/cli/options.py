"""The options of all commands that run a model, and the models, policy and predictor built from them."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from tinydrop_kernels import ops
from tinydrop_kernels.checkpoints import check_spec, load_model
from tinydrop_kernels.cli.target import CLASSES_AND_IMAGES, load_target
from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.patching import patch
from tinydrop_kernels.policy.drop import UNMIXED, DropPolicy
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.torch_internals import has_onednn_linear

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_MODEL = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def number_or_none(text: str) -> float | None:
    """Return the value of ``--tau``: a number, or None for the text ``none``."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor 'none'") from None


def size(text: str) -> tuple[int, int]:
    """Return the value of ``--guidance-size`` as height and width, from one number or ``HEIGHTxWIDTH``."""
    try:
        height, width = map(int, text.split("x")) if "x" in text else (int(text),) * 2
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor HEIGHTxWIDTH") from None
    return height, width


TARGET = click.option(
    "--target",
    "--model",
    "target",
    default=DEFAULT_MODEL,
    help="The large ViT: a timm model name, a folder that timm saved, or NAME=FILE for a timm name and a weights file.",
)
IMG_SIZE = click.option(
    "--img-size", type=click.IntRange(min=1), help="Input size of the target in pixels, if not its own."
)
BATCH_SIZE = click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Images per batch.")
DEVICE = click.option("--device", default=DEFAULT_DEVICE, help="Device that runs the models, such as cpu or cuda.")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="float32",
    help="Precision of the models. 'auto' is bfloat16 if the device computes in it, otherwise float32.",
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    help="Processes that load images. 0 loads them in the main process.",
)


def guidances(what: str) -> Callable[[Command], Command]:
    """Return the option ``--guidance`` of a command that compares several models."""
    return click.option(
        "--guidance",
        multiple=True,
        default=(DEFAULT_GUIDANCE,),
        metavar="NAME",
        help=f"{what}, given like --target. Repeat the option to compare several.",
    )


OPTIONS = (
    TARGET,
    click.option("--guidance", default=DEFAULT_GUIDANCE, help="The tiny classifier, given like --target."),
    click.option(
        "--guidance-size",
        type=size,
        metavar="INT|HxW",
        help="Input size of the guidance model in pixels, if not its own. Smaller is cheaper but less accurate.",
    ),
    IMG_SIZE,
    *CLASSES_AND_IMAGES,
    click.option(
        "--policy",
        "policy_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Policy file from `tinydrop calibrate` for the same two models. It cannot be combined with the policy "
        "options from --tau to --saliency.",
    ),
    click.option(
        "--tau",
        type=number_or_none,
        default=DropPolicy.tau,
        metavar="FLOAT|none",
        help="Images exit if the guidance model's confidence is above this value. 'none' turns exits off.",
    ),
    click.option(
        "--gamma",
        type=float,
        default=DropPolicy.gamma,
        help="An image that does not exit gets a budget of 1 - (confidence / tau)^gamma of its patches. Lower values "
        "keep fewer patches.",
    ),
    click.option(
        "--min-keep",
        type=float,
        default=DropPolicy.min_keep,
        help="Lower limit of that budget, as a fraction of the patches.",
    ),
    click.option(
        "--keep-ratio",
        type=float,
        help="Keep this fraction of the patches of every image that does not exit, in place of --gamma and --min-keep. "
        "Unless given, --coarsen and --blend are 0 and there is no second look.",
    ),
    click.option(
        "--coarsen",
        type=float,
        default=DropPolicy.coarsen,
        help="Share of the reduction that comes from a coarser grid. 0 only drops patches, 1 only lowers the "
        "resolution.",
    ),
    click.option(
        "--blend",
        type=float,
        default=DropPolicy.blend,
        help="Weight of the guidance model's probabilities in the answer if the image does not exit.",
    ),
    click.option(
        "--second-look",
        type=float,
        nargs=2,
        default=DropPolicy.second_look,
        metavar="T1 T2",
        help="Run an image again through the dense target, unless the answer's confidence is above T2, or above T1 if "
        "the guidance model has the same top class. '0 0' turns this off.",
    ),
    click.option(
        "--saliency",
        type=(int, float, float),
        default=DropPolicy.saliency,
        metavar="CLASSES NORM CENTER",
        help="Ranking of patches: number of classes for Grad-CAM, weight of the feature norm, and weight of the image "
        "center.",
    ),
    click.option(
        "--multi-label",
        is_flag=True,
        help="The target's head is multi-label (sigmoids). Rows hold each class's sigmoid score. Exits, blend and "
        "second look are off.",
    ),
    BATCH_SIZE,
    DEVICE,
    DTYPE,
    click.option(
        "--compile", is_flag=True, help="Run the models through torch.compile. The first batches take minutes."
    ),
    click.option(
        "--graphs",
        is_flag=True,
        help="Experimental, GPU only: replay CUDA graphs, so that small batches do not wait for the CPU.",
    ),
    click.option(
        "--prepack",
        is_flag=True,
        help="CPU only: faster, but the blocks' weights take twice the memory.",
    ),
    WORKERS,
    click.option("--stages", is_flag=True, help="Report the time of each stage. This slows a GPU down a little."),
)


def with_options(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command these options, in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = with_options(OPTIONS)  # the options of make_predictor and make_patched


def make_predictor(
    context: click.Context, *, batch_size: int, workers: int, compare_dense: bool, top: int = 5, **options: Any
) -> Predictor:
    """Return the predictor that the options describe.

    Raises:
        click.ClickException: the options contradict each other, or the models cannot be loaded.
    """
    try:
        return Predictor(
            make_patched(context, **options),
            batch_size=batch_size,
            workers=workers,
            top=top,
            compare_dense=compare_dense,
            progress=True,
            on_unreadable=tell_skipped,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None


def make_patched(
    context: click.Context,
    *,
    target: str,
    guidance: str,
    guidance_size: tuple[int, int] | None,
    img_size: int | None,
    classes: list[str] | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    crop_pct: float | None,
    interpolation: str | None,
    policy_file: Path | None,
    keep_ratio: float | None,
    device: str,
    dtype: str,
    compile: bool,
    graphs: bool,
    prepack: bool,
    stages: bool,
    multi_label: bool,
    **policy: Any,
) -> TimmModule:
    """Return the patched model that the options describe.

    Raises:
        ValueError, TypeError, RuntimeError: the options contradict each other, or the models cannot be loaded.
    """
    law = policy_file or chosen_policy(context, keep_ratio, multi_label, policy)
    given = [name for name in ("keep_ratio", *policy) if _was_given(context, name)]
    if policy_file and given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option}: has no effect together with --policy; give one of them")
    check_spec(target, "target")
    small = load_model(guidance, "guidance")  # before the target, so that a mistake in it shows early
    images = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    vit = load_target(target, img_size, classes, **images).to(usable(device), dtype_of(dtype, device))
    ways: dict[str, Any] = {"compile": compile, "graphs": graphs, "prepack": prepack, "multi_label": multi_label}
    patch(vit, small, law, guidance_size=guidance_size, **ways).tinydrop.timed = stages
    return vit


def chosen_policy(
    context: click.Context, keep_ratio: float | None, multi_label: bool, options: dict[str, Any]
) -> DropPolicy:
    """Return the policy that the options describe.

    Options that were not given keep the default of the kind of policy, for example that of :meth:`DropPolicy.fixed`.
    """
    options["saliency"] = ops.Saliency(*options["saliency"])
    given = {name for name in options if _was_given(context, name)}
    if options["second_look"] == (0, 0):
        options["second_look"] = None
    if multi_label:
        options |= {name: value for name, value in UNMIXED.items() if name not in given}
    if keep_ratio is None:
        return DropPolicy(**options)
    for name in ("gamma", "min_keep"):
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')}: has no effect together with --keep-ratio; give one of them")
    return replace(DropPolicy.fixed(keep_ratio), **{name: options[name] for name in given | {"tau"}})


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def usable(device: str) -> torch.device:
    """Return the device.

    Raises:
        ValueError: this machine does not have it, or nothing can be computed on it.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises AssertionError
        raise ValueError(f"device: got {device!r}: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise ValueError("device: got 'meta', on which nothing is computed")
    return torch.device(device)


def check_writable(option: str, path: Path) -> None:
    """Raise ValueError if a file cannot be written, before the models run for hours."""
    if not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"{option}: {str(path)!r} cannot be written: there is no such folder, or it is read-only")


def tell_skipped(name: str, reason: str) -> None:
    """Print a line about a skipped file to standard error, without breaking a progress bar."""
    tqdm.write(f"skipped {click.format_filename(name)}: {reason}", file=sys.stderr)


def dtype_of(name: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype that ``--dtype`` names."""
    return DTYPES.get(name) or fast_dtype(device)


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device computes in it natively, otherwise float32.

    A CPU does so if it has AVX512-BF16 or AMX and oneDNN uses them. Other CPUs emulate bfloat16, which is slower than
    float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        is_native = any(is_supported is not None and is_supported() for is_supported in asked)
        has_bfloat16 = kind == "cpu" and is_native and has_onednn_linear(torch.bfloat16)
    return torch.bfloat16 if has_bfloat16 else torch.float32
