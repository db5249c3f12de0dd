"""``tinydrop classify``, which loses no row, no matter how a run ends."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import torch

from tinydrop_kernels.cli.commands import PATHS, found_images, machine_of, out_of_memory, summary
from tinydrop_kernels.cli.interruption import INTERRUPTED, Interruption
from tinydrop_kernels.cli.options import make_predictor, model_options
from tinydrop_kernels.predict.prediction import as_text, unreadable_row
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.predict.row_file import (
    FORMATS,
    PrintedRows,
    RowFileError,
    RowOutput,
    file_of_rows,
    format_of,
    remaining,
)
from tinydrop_kernels.predict.row_format import Row
from tinydrop_kernels.predict.run_record import RunRecord


@click.command()
@PATHS
@model_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the rows to this file, not to standard output: .jsonl or .ndjson (JSON lines), .csv or .parquet. Each "
    "batch is on the disk before the next one begins. FILE.run.json beside it records the run.",
)
@click.option("--format", "form", type=click.Choice(FORMATS), help="Format of that file, if not the one of its ending.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the file of --out: classify only the images that have no row in it. Give the same paths and options "
    "as before.",
)
@click.option("--top", type=click.IntRange(min=1), default=5, help="Number of classes in each row.")
@click.option("--compare-dense", is_flag=True, help="Also run the dense model, and report speed-up and agreement.")
@click.pass_context
def classify(
    context: click.Context,
    /,
    paths: tuple[Path, ...],
    out: Path | None,
    form: str | None,
    resume: bool,
    top: int,
    **options: Any,
) -> None:
    """Classify images with a patched model, and report the savings.

    PATHS are image files, and folders that are searched for images with all their subfolders. Each image gives one row
    with its most probable classes, its exit and its kept patches. An image that cannot be read gives a row with the
    error. A summary of all images follows.

    A run that was interrupted keeps its rows, and --resume continues it. The exit status is 130 after Ctrl-C and 143
    after SIGTERM.

    \b
    Examples:
      tinydrop classify photos/ --out rows.jsonl --compare-dense
      tinydrop classify photos/ --out rows.parquet --resume
      tinydrop classify photo.jpg --target deit3_base_patch16_224.fb_in22k_ft_in1k
      tinydrop classify photos/ --policy policy.json
    """
    output = _output(out, form, resume, top)
    interruption = Interruption()
    try:
        with interruption, output as rows:
            files = found_images(paths)
            left = [files[position] for position in remaining((as_text(str(file)) for file in files), rows.done)]
            if rows.done:
                click.echo(f"{rows.done.total()} rows are there, {len(left)} of {len(files)} images are left", err=True)
            predictor = make_predictor(context, top=top, **options)
            record = RunRecord(out, rows, predictor, ["tinydrop", *sys.argv[1:]]) if out else None
            ended = _run(predictor, left, rows, record, interruption)
    except KeyboardInterrupt:  # before the first image, or again while the run was ending
        click.echo("interrupted", err=True)
        context.exit(interruption.status or INTERRUPTED)
    except RowFileError as error:
        raise click.ClickException(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from None
    click.echo(summary(predictor, machine_of(predictor, options)), err=out is None)
    if ended == "interrupted":
        how = f"; --resume continues {click.format_filename(out)}" if out and rows.written else ""
        click.echo(f"interrupted after {rows.written} of {len(left)} images{how}", err=True)
        context.exit(interruption.status or INTERRUPTED)
    if predictor.report is None and not rows.done:
        raise click.ClickException("no image could be read")


def _output(out: Path | None, form: str | None, resume: bool, top: int) -> RowOutput:
    """Return the output of rows, before any work is done.

    Raises:
        click.ClickException: the options contradict each other.
    """
    if out is None:
        for option, value in (("--format", form), ("--resume", resume)):
            if value:
                raise click.UsageError(f"{option}: has no effect without --out")
        return PrintedRows()
    try:
        return file_of_rows(out, format_of(out, form), top, resume)
    except ValueError as error:
        raise click.ClickException(str(error)) from None


def _run(
    predictor: Predictor, files: Sequence[Path], rows: RowOutput, record: RunRecord | None, interruption: Interruption
) -> str:
    """Write the rows of the images, and return "complete" or "interrupted". The record has it too, or "failed"."""
    try:
        for batch in _batches(predictor, files):
            rows.append(batch)
            interruption.check()
        rows.finish()
        ended = "complete"
    except BaseException as error:
        # The end of a loading process by the same signal may be the error that arrives here.
        if not isinstance(error, KeyboardInterrupt) and interruption.status is None:
            if record:
                with suppress(RowFileError):  # because the disk may be full, and the first error says more
                    record.end("failed")
            raise
        ended = "interrupted"
    if record:
        record.end(ended)
    return ended


def _batches(predictor: Predictor, files: Sequence[Path]) -> Iterator[list[Row]]:
    """Yield the rows of each batch. Images that cannot be read have theirs in the order of the files."""
    classified = reported = 0
    for seen in predictor.batches(files):
        rows = []
        for prediction in seen.rows:
            before = prediction.index - classified  # number of unreadable images before this one
            rows += [unreadable_row(*image) for image in predictor.unreadable[reported:before]]
            rows.append(prediction.as_dict())
            classified, reported = classified + 1, before
        yield rows
    yield [unreadable_row(*image) for image in predictor.unreadable[reported:]]
