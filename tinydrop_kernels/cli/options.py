"""What the commands that run a model share: its options, and the model, the policy and the predictor made of them."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from tinydrop_kernels import ops
from tinydrop_kernels.checkpoints import check_spec, load_model
from tinydrop_kernels.engine.checks import check_classifier
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE
from tinydrop_kernels.patching import patch
from tinydrop_kernels.policy.drop import UNMIXED, DropPolicy
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.torch_internals import has_onednn_linear

Command = TypeVar("Command", bound=Callable[..., Any])

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_MODEL = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def number_or_none(text: str) -> float | None:
    """The type of ``--tau``: a number, or ``none`` for no early exit."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor 'none'") from None


def size(text: str) -> tuple[int, int]:
    """The type of ``--guidance-size``: one number, or height and width."""
    try:
        height, width = map(int, text.split("x")) if "x" in text else (int(text),) * 2
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor HEIGHTxWIDTH") from None
    return height, width


TARGET = click.option(
    "--target", "--model", "target", default=DEFAULT_MODEL, help="The large ViT: timm name, folder, or NAME=FILE."
)
IMG_SIZE = click.option("--img-size", type=click.IntRange(min=1), help="Input size of the target, if not its own.")
BATCH_SIZE = click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Images in a batch.")
DEVICE = click.option("--device", default=DEFAULT_DEVICE, help="Where the models run, such as cpu or cuda.")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["auto", *DTYPES]),
    default="float32",
    help="'auto' is bfloat16 where the device computes in it, otherwise float32.",
)
WORKERS = click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes that load images.")

OPTIONS = (
    TARGET,
    click.option("--guidance", default=DEFAULT_GUIDANCE, help="The tiny classifier: timm name, folder, or NAME=FILE."),
    click.option(
        "--guidance-size",
        type=size,
        metavar="INT|HxW",
        help="Input size of the classifier, if not its own: less costs less, and sees less.",
    ),
    IMG_SIZE,
    click.option(
        "--policy",
        "policy_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A file of `tinydrop calibrate`, in place of all options of the policy.",
    ),
    click.option(
        "--tau",
        type=number_or_none,
        default=DropPolicy.tau,
        metavar="FLOAT|none",
        help="Exit above this confidence; 'none' never exits.",
    ),
    click.option("--gamma", type=float, default=DropPolicy.gamma, help="Curvature: low drops aggressively."),
    click.option(
        "--min-keep", type=float, default=DropPolicy.min_keep, help="Least fraction of the tokens that is kept."
    ),
    click.option(
        "--keep-ratio",
        type=float,
        help="Keep this fraction of every image that does not exit, however sure the guidance is; "
        "instead of --gamma and --min-keep. --tau still decides which images exit.",
    ),
    click.option(
        "--coarsen",
        type=float,
        default=DropPolicy.coarsen,
        help="Share of the cut that a coarser grid takes: 0 drops patches alone, 1 lowers the resolution alone.",
    ),
    click.option(
        "--blend",
        type=float,
        default=DropPolicy.blend,
        help="Weight of the guidance's probabilities in the answer for an image that does not exit.",
    ),
    click.option(
        "--second-look",
        type=float,
        nargs=2,
        default=DropPolicy.second_look,
        metavar="T1 T2",
        help="Let an image go through dense unless its answer is surer than T2, or surer than T1 and the guidance's "
        "too; 0 0 never does.",
    ),
    click.option(
        "--saliency",
        type=(int, float, float),
        default=DropPolicy.saliency,
        metavar="CLASSES NORM CENTER",
        help="What ranks the patches: Grad-CAM of so many classes, weights of the feature's norm and of the center.",
    ),
    click.option(
        "--multi-label",
        is_flag=True,
        help="The model's head is one of sigmoids: by default nothing exits, blends or looks twice, and rows have "
        "each class's own score.",
    ),
    BATCH_SIZE,
    DEVICE,
    DTYPE,
    click.option("--compile", is_flag=True, help="Compile the models: the first batches take minutes."),
    click.option(
        "--graphs",
        is_flag=True,
        help="Experimental, on a GPU: CUDA graphs, so that small batches do not wait for the host.",
    ),
    click.option("--prepack", is_flag=True, help="On CPU: faster, for the memory of the model's weights once more."),
    WORKERS,
    click.option("--stages", is_flag=True, help="Time every stage; a GPU waits at each, so all is a little slower."),
)


def model_options(command: Command) -> Command:
    """Give a command the options that :func:`make_predictor` takes."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def make_predictor(
    context: click.Context,
    *,
    target: str,
    guidance: str,
    guidance_size: tuple[int, int] | None,
    img_size: int | None,
    policy_file: Path | None,
    keep_ratio: float | None,
    batch_size: int,
    device: str,
    dtype: str,
    compile: bool,
    graphs: bool,
    prepack: bool,
    workers: int,
    stages: bool,
    multi_label: bool,
    compare_dense: bool,
    **policy: Any,
) -> Predictor:
    """The predictor of the options.

    Raises:
        click.ClickException: they do not fit, or the models cannot be loaded.
    """
    try:
        law = policy_file or chosen_policy(context, keep_ratio, multi_label, policy)
        given = [name for name in ("keep_ratio", *policy) if _was_given(context, name)]
        if policy_file and given:
            option = f"--{given[0].replace('_', '-')}"
            raise ValueError(f"{option}: has no effect together with --policy; give one of them")
        options: dict[str, Any] = {"img_size": img_size} if img_size else {}
        check_spec(target, "target")
        small = load_model(guidance, "guidance")  # before the large one: nobody should wait for it to hear of a mistake
        vit = load_model(target, "target", **options).to(usable(device), dtype_of(dtype, device))
        check_classifier(count_classes(vit))  # patch() would speak of the guidance
        ways: dict[str, Any] = {"compile": compile, "graphs": graphs, "prepack": prepack, "multi_label": multi_label}
        patch(vit, small, law, guidance_size=guidance_size, **ways).tinydrop.timed = stages
        return Predictor(
            vit,
            batch_size=batch_size,
            workers=workers,
            compare_dense=compare_dense,
            progress=True,
            on_unreadable=tell_skipped,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None


def chosen_policy(
    context: click.Context, keep_ratio: float | None, multi_label: bool, options: dict[str, Any]
) -> DropPolicy:
    """The policy of the options; what was not given on the command line stays as the kind of policy has it."""
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
    """The device, or ValueError where this machine has none such."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device: got {device!r}: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise ValueError("device: got 'meta', on which nothing is computed")
    return torch.device(device)


def tell_skipped(name: str, reason: str) -> None:
    """A line on standard error, clear of a progress bar."""
    tqdm.write(f"skipped {click.format_filename(name)}: {reason}", file=sys.stderr)


def dtype_of(name: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype that ``--dtype`` names."""
    return DTYPES.get(name) or fast_dtype(device)


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """Return bfloat16 if the device computes in it, else float32.

    On a CPU that takes AVX512-BF16 or AMX, and a oneDNN that uses them: others emulate bfloat16, slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asked = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        is_native = any(is_supported is not None and is_supported() for is_supported in asked)
        has_bfloat16 = kind == "cpu" and is_native and has_onednn_linear(torch.bfloat16)
    return torch.bfloat16 if has_bfloat16 else torch.float32
