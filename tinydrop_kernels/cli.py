"""``tinydrop``: classify images, and tell what would run how on this machine."""

import importlib.metadata
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from tqdm import tqdm

from tinydrop_kernels import ops
from tinydrop_kernels.checkpoints import check_spec, load_model
from tinydrop_kernels.guidance import DEFAULT_GUIDANCE
from tinydrop_kernels.images import image_files
from tinydrop_kernels.patching import patch
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.predictor import Predictor, check_classifier
from tinydrop_kernels.rowfile import RowFile, RowFileError
from tinydrop_kernels.version import __version__

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def number_or_none(text: str) -> float | None:
    """The type of ``--tau``: a number, or ``none`` for no early exit."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor 'none'") from None


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, package_name="tinydrop_kernels")
def main() -> None:
    """Token dropping for timm's Vision Transformers."""


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--model",
    default="vit_base_patch16_224.augreg2_in21k_ft_in1k",
    help="The large ViT: timm name, folder, or NAME=FILE.",
)
@click.option("--guidance", default=DEFAULT_GUIDANCE, help="The tiny classifier, named likewise.")
@click.option("--img-size", type=click.IntRange(min=1), help="Input size of the large ViT, if not its own.")
@click.option(
    "--tau",
    type=number_or_none,
    default=DropPolicy.tau,
    metavar="FLOAT|none",
    help="Exit above this confidence; 'none' never exits.",
)
@click.option("--gamma", type=float, default=DropPolicy.gamma, help="Curvature: low drops aggressively.")
@click.option("--min-keep", type=float, default=DropPolicy.min_keep, help="Least fraction of the tokens that is kept.")
@click.option(
    "--keep-ratio",
    type=float,
    help="Keep this fraction of every image that does not exit, however sure the guidance is; "
    "instead of --gamma and --min-keep. --tau still decides which images exit.",
)
@click.option(
    "--coarsen",
    type=float,
    default=DropPolicy.coarsen,
    help="Share of the cut that a coarser grid takes: 0 drops patches alone, 1 lowers the resolution alone.",
)
@click.option(
    "--blend",
    type=float,
    default=DropPolicy.blend,
    help="Weight of the guidance's probabilities in the answer for an image that does not exit.",
)
@click.option(
    "--second-look",
    type=float,
    nargs=2,
    default=DropPolicy.second_look,
    metavar="T1 T2",
    help="Let an image go through dense unless its answer is surer than T2, or surer than T1 and the guidance's too; "
    "0 0 never does.",
)
@click.option(
    "--saliency",
    type=(int, float, float),
    default=DropPolicy.saliency,
    metavar="CLASSES NORM CENTRE",
    help="What ranks the patches: Grad-CAM of so many classes, weights of the feature's norm and of the centre.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32)
@click.option("--device", default=DEFAULT_DEVICE)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes that load images.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a JSON line per image to this file, which appears at the end; otherwise they are printed.",
)
@click.option("--compare-dense", is_flag=True, help="Run the dense model on the same batches too.")
@click.pass_context
def classify(
    context: click.Context,
    /,
    paths: tuple[Path, ...],
    model: str,
    guidance: str,
    img_size: int | None,
    keep_ratio: float | None,
    batch_size: int,
    device: str,
    dtype: str,
    workers: int,
    out: Path | None,
    compare_dense: bool,
    **policy: Any,
) -> None:
    """Classify images: files, and all images in folders."""
    files = image_files(paths, lambda path, reason: tell_skipped(str(path), reason))
    if not files:
        raise click.ClickException(f"no image in {', '.join(map(click.format_filename, paths))}")
    interrupted = False
    try:
        with RowFile(out) as rows:  # before the models: nobody should wait for them to hear that it cannot be written
            try:
                law = chosen_policy(context, keep_ratio, policy)
                options: dict[str, Any] = {"img_size": img_size} if img_size else {}
                check_spec(model)
                small = load_model(guidance, "guidance")  # before the large one, likewise
                vit = load_model(model, **options).to(usable(device), DTYPES[dtype])
                check_classifier(vit)  # patch() would speak of the guidance
                predictor = Predictor(
                    patch(vit, small, law),
                    batch_size=batch_size,
                    workers=workers,
                    compare_dense=compare_dense,
                    progress=True,
                    on_unreadable=tell_skipped,
                )
            except (ValueError, TypeError, RuntimeError) as error:
                raise click.ClickException(str(error)) from None
            try:
                for prediction in predictor.predict(files):
                    rows.write(json.dumps(prediction.as_dict()))
            except KeyboardInterrupt:
                interrupted = True
    except RowFileError as error:
        raise click.ClickException(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise click.ClickException(f"{error}\nA smaller --batch-size needs less memory.") from None
    if not (rows.written or interrupted):
        raise click.ClickException("no image could be read")
    click.echo(summary(predictor, f"{device}, {dtype}"), err=out is None)
    if interrupted:
        kept = f"; their rows are in {click.format_filename(out)}" if out and rows.written else ""
        click.echo(f"interrupted after {rows.written} of {len(files)} images{kept}", err=True)
        context.exit(INTERRUPTED)


def chosen_policy(context: click.Context, keep_ratio: float | None, options: dict[str, Any]) -> DropPolicy:
    """The policy of the options; what was not given on the command line stays as the kind of policy has it."""
    options["saliency"] = ops.Saliency(*options["saliency"])
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if keep_ratio is None:
        return DropPolicy(**options)
    for name in ("gamma", "min_keep"):
        if name in given:
            raise ValueError(f"--{name.replace('_', '-')}: has no effect together with --keep-ratio; give one of them")
    return replace(DropPolicy.fixed(keep_ratio), **{name: options[name] for name in given | {"tau"}})


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


def summary(predictor: Predictor, machine: str) -> str:
    """What came together over all images, for reading."""
    report, unreadable = predictor.report, len(predictor.unreadable)
    if report is None:
        return f"images       0, unreadable {unreadable}"
    keep = f"{report.mean_keep:.1%}" if report.exits < report.images else "none stayed"
    lines = [
        f"images       {report.images}, unreadable {unreadable}",
        f"exits        {report.exits} ({report.exits / report.images:.1%})",
        f"mean keep    {keep} (of the patches of images that stayed)",
        f"FLOPs saved  {report.flops_saved:.1%} (guidance counted)",
        f"images/s     {report.images / predictor.seconds:.1f} ({machine}; models only, guidance counted)",
    ]
    if report.second_looks:
        lines.insert(3, f"second looks {report.second_looks} ({report.second_looks / report.images:.1%})")
    if predictor.compare_dense:
        speed_up = predictor.dense_seconds / predictor.seconds
        lines += [
            f"dense        {report.images / predictor.dense_seconds:.1f} images/s",
            f"speed-up     {speed_up:.2f} x",
            f"agreement    {predictor.agreeing / report.images:.1%} of the top classes",
        ]
        if speed_up < 1:
            lines.append("note: with token dropping the model was slower than dense on these images and this machine")
    if report.guidance_flops > report.dense_flops:
        times = report.guidance_flops / report.dense_flops
        lines.append(
            f"note: the guidance model alone costs {times:.1f} times the FLOPs of the dense model: take a smaller one"
        )
    return "\n".join(lines)


@main.command()
@click.option("--device", default=DEFAULT_DEVICE)
def info(device: str) -> None:
    """Versions, device, and what each operator would run."""
    try:
        kind = usable(device).type
        running = {name: operator.explain(kind) for name, operator in ops.OPERATORS.items()}
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{'tinydrop_kernels':22s}{__version__}")
    for package in ("torch", "timm", "triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        click.echo(f"{package:22s}{version}")
    click.echo(f"{'python':22s}{platform.python_version()}")
    hardware = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine()
    click.echo(f"{'device':22s}{device} ({hardware})")
    for name, (implementation, reason) in running.items():
        click.echo(f"{name:22s}{implementation}: {reason}")
    extension = ops.cuda_extension
    click.echo(f"{'CUDA C++ extension':22s}{'built' if extension.available() else extension.WHY_NOT}")
