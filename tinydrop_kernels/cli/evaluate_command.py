"""``tinydrop evaluate``, which measures the accuracy and the speed of a patched model on labelled images."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from tinydrop_kernels.checkpoints import class_names
from tinydrop_kernels.cli.commands import found_images, machine, out_of_memory, stages_and_notes
from tinydrop_kernels.cli.interruption import INTERRUPTED
from tinydrop_kernels.cli.options import check_writable, make_patched, model_options, tell_skipped
from tinydrop_kernels.predict.evaluation import Evaluation
from tinydrop_kernels.predict.evaluation import evaluate as evaluate_model
from tinydrop_kernels.predict.loading import FolderBatches, ImageLoader, folder_labels

ENDINGS = (".csv", ".json")


@click.command()
@click.argument("data", metavar="IMAGEFOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path))
@model_options
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the results to this file, in the columns of timm's validate.py. The name ends in .csv or .json.",
)
@click.pass_context
def evaluate(
    context: click.Context, /, data: Path, out: Path | None, batch_size: int, workers: int, **options: Any
) -> None:
    """Measure accuracy and speed on labelled images, patched against dense.

    The accuracy of guidance alone is measured too. IMAGEFOLDER has one subfolder of images per class. The subfolders
    have the names of the classes, or are as many as the classes and sorted in their order. --classes gives the classes
    other names.

    \b
    Examples:
      tinydrop evaluate imagenet/val --out results.csv
      tinydrop evaluate photos/ --target vit_small_patch14_dinov2=mine.safetensors --img-size 224 --classes names.txt
    """
    try:
        if out and out.suffix not in ENDINGS:
            raise ValueError(f"out: got {str(out)!r}, expected a name that ends in {' or '.join(ENDINGS)}")
        if out:
            check_writable("out", out)
        files = found_images((data,))
        model = make_patched(context, **options)
        labels = labels_of(data, files, class_names(model, model.tinydrop.num_classes))
        is_on_gpu = next(model.parameters()).is_cuda
        load = ImageLoader(model, batch_size, workers, tell_skipped, progress=True, pin_memory=is_on_gpu)
        found = evaluate_model(model, FolderBatches(files, labels, load))
        where = f"{machine(model, options['device'], batch_size)}, models only"
        click.echo(f"images {found.images}, unreadable {len(files) - found.images} ({where})\n{found}")
        stages, notes = stages_and_notes(found.report)
        for line in (*stages, *notes):
            click.echo(line)
        if out:
            out.write_text(as_text(found, out.suffix), encoding="utf-8")
    except KeyboardInterrupt:
        click.echo("interrupted; nothing was measured", err=True)
        context.exit(INTERRUPTED)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from None
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None


def labels_of(data: Path, files: Sequence[Path], names: Sequence[str]) -> list[int]:
    """Return the class of each file, taken from the name of its folder.

    Args:
        data: the folder that contains the class folders.
        files: files below it.
        names: names of the classes.

    Raises:
        ValueError: a file is in no class folder, or the folders do not match the classes.
    """
    labels = folder_labels(data, files, names)
    if labels is not None:
        return labels
    outside = [file for file in files if file.parent == data]
    if outside:
        raise ValueError(f"data: {len(outside)} images are in no class folder, such as {outside[0].name!r}")
    folders = sorted({file.relative_to(data).parts[0] for file in files})
    odd = next((folder for folder in folders if list(names).count(folder) != 1), folders[0])
    raise ValueError(
        f"data: got {len(folders)} folders, such as {odd!r}, and the target has {len(names)} classes, such as "
        f"{names[0]!r}; expected each folder to have the name of one class, or as many folders as classes and none of "
        "their names. --classes FILE gives the classes other names"
    )


def as_text(evaluation: Evaluation, ending: str) -> str:
    """Return the results as the text of a file, in JSON or CSV with one row for each model."""
    columns = evaluation.as_dict()
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if ending == ".json":
        return json.dumps(rows, indent=2) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
