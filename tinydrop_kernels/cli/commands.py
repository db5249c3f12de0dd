"""``tinydrop classify``, ``visualize`` and ``info``."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import click
import torch

from tinydrop_kernels import ops
from tinydrop_kernels.cli.options import DEFAULT_DEVICE, make_predictor, model_options, tell_skipped, usable
from tinydrop_kernels.predict.images import image_files
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.predict.row_file import RowFile, RowFileError
from tinydrop_kernels.version import __version__
from tinydrop_kernels.visualize.gallery import Gallery

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PATHS = click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))


@click.command()
@PATHS
@model_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a JSON line per image to this file, which appears at the end; otherwise they are printed.",
)
@click.option("--compare-dense", is_flag=True, help="Run the dense model on the same batches too.")
@click.pass_context
def classify(context: click.Context, /, paths: tuple[Path, ...], out: Path | None, **options: Any) -> None:
    """Classify images: files, and all images in folders."""
    files = found_images(paths)
    interrupted = False
    try:
        with RowFile(out) as rows:  # before the models: nobody should wait for them to hear that it cannot be written
            predictor = make_predictor(context, **options)
            try:
                for prediction in predictor.predict(files):
                    rows.write(json.dumps(prediction.as_dict()))
            except KeyboardInterrupt:
                interrupted = True
    except RowFileError as error:
        raise click.ClickException(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from None
    if not (rows.written or interrupted):
        raise click.ClickException("no image could be read")
    click.echo(summary(predictor, machine(predictor, options)), err=out is None)
    if interrupted:
        kept = f"; their rows are in {click.format_filename(out)}" if out and rows.written else ""
        click.echo(f"interrupted after {rows.written} of {len(files)} images{kept}", err=True)
        context.exit(INTERRUPTED)


@click.command()
@PATHS
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder for a PNG file per image and for index.html, which needs no other file.",
)
@model_options
@click.option("--dense", "compare_dense", is_flag=True, help="Ask the dense model too: a dense pass for each image.")
@click.pass_context
def visualize(context: click.Context, /, paths: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write pictures of the kept patches, and an HTML page to browse them."""
    files = found_images(paths)
    interrupted = False
    try:
        out.mkdir(parents=True, exist_ok=True)
        predictor = make_predictor(context, **options)
        gallery = Gallery(out, predictor)
        try:
            for seen in predictor.batches(files):
                gallery.add(seen)
        except KeyboardInterrupt:
            interrupted = True
        if not (gallery.cards or interrupted):
            raise click.ClickException("no image could be read")
        page = gallery.write() if gallery.cards else None
    except RowFileError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"out: {str(out)!r} cannot be written: {error.strerror or error}") from None
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from None
    click.echo(summary(predictor, machine(predictor, options)))
    if page:
        click.echo(f"page         {click.format_filename(page)} ({page.stat().st_size / 1e6:.1f} MB)")
    if interrupted:
        click.echo(f"interrupted after {len(gallery.cards)} of {len(files)} images", err=True)
        context.exit(INTERRUPTED)


def found_images(paths: tuple[Path, ...]) -> list[Path]:
    """The images in these files and folders, or an error where there are none."""
    files = image_files(paths, lambda path, reason: tell_skipped(str(path), reason))
    if not files:
        raise click.ClickException(f"no image in {', '.join(map(click.format_filename, paths))}")
    return files


def out_of_memory(error: torch.OutOfMemoryError) -> click.ClickException:
    """What there is to do about it."""
    return click.ClickException(f"{error}\nA smaller --batch-size needs less memory.")


def machine(predictor: Predictor, options: dict[str, Any]) -> str:
    """Where and how the models ran."""
    dtype = str(next(predictor.model.parameters()).dtype).removeprefix("torch.")
    graphs = predictor.model.tinydrop.graphs
    replayed = "" if graphs is None else f", CUDA graphs of {graphs}"
    beside = "loading beside them" if predictor.overlaps else "models only"
    return f"{options['device']}, {dtype}, batches of {options['batch_size']}, {beside}{replayed}"


def summary(predictor: Predictor, machine: str) -> str:
    """What came together over all images, for reading."""
    report, unreadable = predictor.report, len(predictor.unreadable)
    if report is None or report.wall_seconds is None:
        return f"images       0, unreadable {unreadable}"
    keep = f"{report.mean_keep:.1%}" if report.exits < report.images else "none stayed"
    lines = [
        f"images       {report.images}, unreadable {unreadable}",
        f"exits        {report.exits} ({report.exits / report.images:.1%})",
        f"mean keep    {keep} (of the patches of images that stayed)",
        f"FLOPs saved  {report.flops_saved:.1%} (guidance counted); "
        f"exits alone {1 - report.cascade_flops / report.dense_flops:.1%}",
        f"images/s     {report.images / report.wall_seconds:.1f} ({machine}; guidance, selection, "
        f"packing and {report.read_backs} read-backs in {report.calls} batches counted)",
    ]
    if report.second_looks:
        lines.insert(3, f"second looks {report.second_looks} ({report.second_looks / report.images:.1%})")
    if report.seconds:
        stages = (f"{stage} {1e3 * spent / report.images:.2f}" for stage, spent in report.seconds.items())
        lines.append(f"ms an image  {', '.join(stages)}")
    if report.speed_up and report.dense_seconds:
        lines += [
            f"dense        {report.images / report.dense_seconds:.1f} images/s",
            f"speed-up     {report.speed_up:.2f} x",
            f"agreement    {predictor.agreeing / report.images:.1%} of the top classes",
        ]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


@click.command()
@click.option("--device", default=DEFAULT_DEVICE)
def info(device: str) -> None:
    """Print versions, the device, and the implementation that each operator would run."""
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
    click.echo(f"{'CUDA C++ extension':22s}{'built, experimental' if extension.available() else extension.WHY_NOT}")
