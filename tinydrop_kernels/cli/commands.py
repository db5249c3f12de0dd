"""``tinydrop visualize`` and ``tinydrop info``, and what commands that classify images share."""

import platform
from pathlib import Path
from typing import Any

import click
import torch

from tinydrop_kernels import ops
from tinydrop_kernels.cli.interruption import INTERRUPTED
from tinydrop_kernels.cli.options import DEFAULT_DEVICE, make_predictor, model_options, tell_skipped, usable
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.predict.images import image_files
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.predict.run_record import versions
from tinydrop_kernels.report import Report
from tinydrop_kernels.visualize.gallery import Gallery

PATHS = click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))


@click.command()
@PATHS
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for one PNG file per image and for index.html. It is created if it does not exist.",
)
@model_options
@click.option("--dense", "compare_dense", is_flag=True, help="Also run the dense model, and show its answers.")
@click.pass_context
def visualize(context: click.Context, /, paths: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write pictures of the kept patches, and an HTML page to browse them.

    PATHS are image files, and folders that are searched for images with all their subfolders. Open index.html in a
    browser. It shows for each image the input, the saliency, the kept patches and the answers of the models.

    \b
    Example:
      tinydrop visualize photos/ --out pictures/ --dense
    """
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
    except OSError as error:
        raise click.ClickException(f"out: {str(out)!r} cannot be written: {error.strerror or error}") from None
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from None
    click.echo(summary(predictor, machine_of(predictor, options)))
    if page:
        click.echo(f"page         {click.format_filename(page)} ({page.stat().st_size / 1e6:.1f} MB)")
    if interrupted:
        click.echo(f"interrupted after {len(gallery.cards)} of {len(files)} images", err=True)
        context.exit(INTERRUPTED)


def found_images(paths: tuple[Path, ...]) -> list[Path]:
    """Return the image files among these files and folders.

    Raises:
        click.ClickException: there are none.
    """
    files = image_files(paths, lambda path, reason: tell_skipped(str(path), reason))
    if not files:
        raise click.ClickException(f"no image in {', '.join(map(click.format_filename, paths))}")
    return files


def out_of_memory(error: torch.OutOfMemoryError) -> click.ClickException:
    """Return an error that suggests a smaller batch."""
    return click.ClickException(f"{error}\nA smaller --batch-size needs less memory.")


def machine(model: TimmModule, device: str, batch_size: int) -> str:
    """Return the device, dtype and batch size of a run in words."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{device}, {dtype}, batches of {batch_size}"


def machine_of(predictor: Predictor, options: dict[str, Any]) -> str:
    """Return :func:`machine`, whether loading is included in the time, and the calls from CUDA graphs."""
    graphs = predictor.model.tinydrop.graphs
    replayed = "" if graphs is None else f", CUDA graphs of {graphs}"
    beside = "loading included" if predictor.overlaps else "models only"
    return f"{machine(predictor.model, options['device'], options['batch_size'])}, {beside}{replayed}"


def stages_and_notes(report: Report) -> tuple[list[str], list[str]]:
    """Return the line of the stages' times, if they were timed, and the lines of the notes."""
    stages = (f"{stage} {1e3 * spent / report.images:.2f}" for stage, spent in report.seconds.items())
    return [f"ms per image {', '.join(stages)}"] if report.seconds else [], [f"note: {note}" for note in report.notes]


def summary(predictor: Predictor, machine: str) -> str:
    """Return the summary of all images as text."""
    report, unreadable = predictor.report, len(predictor.unreadable)
    if report is None or report.wall_seconds is None:
        return f"images       0, unreadable {unreadable}"
    keep = f"{report.mean_keep:.1%}" if report.exits < report.images else "all images exited"
    lines = [
        f"images       {report.images}, unreadable {unreadable}",
        f"exits        {report.exits} ({report.exits / report.images:.1%})",
        f"mean keep    {keep} (of the dense patches, for images that did not exit)",
        f"FLOPs saved  {report.flops_saved:.1%} (guidance included); "
        f"exits alone would save {1 - report.cascade_flops / report.dense_flops:.1%}",
        f"images/s     {report.images / report.wall_seconds:.1f} ({machine}; guidance, selection, "
        f"packing and {report.read_backs} read-backs in {report.calls} batches included)",
    ]
    if report.second_looks:
        lines.insert(3, f"second looks {report.second_looks} ({report.second_looks / report.images:.1%})")
    stages, notes = stages_and_notes(report)
    lines += stages
    if report.speed_up and report.dense_seconds:
        lines += [
            f"dense        {report.images / report.dense_seconds:.1f} images/s",
            f"speed-up     {report.speed_up:.2f} x",
            f"agreement    {predictor.agreeing / report.images:.1%} of the images have the dense model's top class",
        ]
    return "\n".join([*lines, *notes])


@click.command()
@click.option("--device", default=DEFAULT_DEVICE, help="Device to report on, such as cpu or cuda.")
def info(device: str) -> None:
    """Print versions, the device, and the implementation of each operator.

    The reason for each choice follows it, such as a missing Triton or a variable TINYDROP_BACKEND. Include this output
    in bug reports.
    """
    try:
        kind = usable(device).type
        running = {name: operator.explain(kind) for name, operator in ops.OPERATORS.items()}
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    for package, version in versions().items():
        click.echo(f"{package:22s}{version or 'not installed'}")
    click.echo(f"{'python':22s}{platform.python_version()}")
    hardware = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine()
    click.echo(f"{'device':22s}{device} ({hardware})")
    for name, (implementation, reason) in running.items():
        click.echo(f"{name:22s}{implementation}: {reason}")
    extension = ops.cuda_extension
    click.echo(f"{'CUDA C++ extension':22s}{'built, experimental' if extension.available() else extension.WHY_NOT}")
