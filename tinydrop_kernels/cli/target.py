"""The target of a command: the names of its classes, and the preprocessing of its images."""

from pathlib import Path
from typing import Any

import click

from tinydrop_kernels.checkpoints import difference_from_checkpoint, load_model
from tinydrop_kernels.engine.checks import check_classifier
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.normalization import check_statistic
from tinydrop_kernels.ops.types import TimmModule

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # timm's names
RGB = 3  # numbers in --mean and --std; a model of one channel gets their average, as in timm


def read_names(context: click.Context, parameter: click.Parameter, path: Path | None) -> list[str] | None:
    """Return the class names of ``--classes``, one from each line of the file.

    Raises:
        click.BadParameter: the file is not UTF-8, or a line before the last name is empty.
    """
    if path is None:
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{str(path)!r} cannot be read as UTF-8: {error}") from None
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise click.BadParameter(f"{str(path)!r} has no class name in line {line}, expected one in each line")
    return names


def read_statistic(
    context: click.Context, parameter: click.Parameter, values: tuple[float, ...] | None
) -> tuple[float, ...] | None:
    """Return the value of ``--mean`` or ``--std``.

    Raises:
        click.BadParameter: a number is not finite, or a standard deviation is not above 0.
    """
    try:
        return None if values is None else check_statistic(parameter.name or "", values, RGB)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


CLASSES_AND_IMAGES = (
    click.option(
        "--classes",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        callback=read_names,
        metavar="FILE",
        help="Text file with the name of one class in each line, in the order of the target's head. It replaces the "
        "checkpoint's names.",
    ),
    click.option(
        "--mean",
        type=float,
        nargs=RGB,
        callback=read_statistic,
        metavar="R G B",
        help="Mean of the pixels in [0, 1] that images are normalised with, if not the checkpoint's.",
    ),
    click.option(
        "--std",
        type=float,
        nargs=RGB,
        callback=read_statistic,
        metavar="R G B",
        help="Standard deviation that images are normalised with, if not the checkpoint's.",
    ),
    click.option(
        "--crop-pct",
        type=click.FloatRange(0, 1, min_open=True),
        help="Share of the resized image that the center crop keeps of each side, if not the checkpoint's.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(INTERPOLATIONS),
        help="Interpolation that resizes the images, if not the checkpoint's.",
    ),
)


def load_target(spec: str, img_size: int | None, classes: list[str] | None, **images: Any) -> TimmModule:
    """Return the target with its class names and preprocessing in its ``pretrained_cfg``.

    A warning goes to standard error if its images differ from those that a local checkpoint is for.

    Args:
        spec: the model, as for :func:`checkpoints.load_model`.
        img_size: input size in pixels; None for the model's own.
        classes: names of the classes; None for the checkpoint's.
        images: values of ``mean``, ``std``, ``crop_pct`` and ``interpolation``; None for the checkpoint's.

    Raises:
        ValueError: there is no such model, it has no classes, or the number of names is not that of its classes.
        RuntimeError: the weights cannot be loaded, or the family is not supported.
    """
    options: dict[str, Any] = {"img_size": img_size} if img_size else {}
    model = load_model(spec, "target", **options)
    count = count_classes(model)
    check_classifier(count)  # here, because patch() would blame the guidance model
    if classes is not None and len(classes) != count:
        raise ValueError(f"classes: got {len(classes)} names, but the target's head has {count} classes")
    given = {name: value for name, value in (images | {"label_names": classes}).items() if value is not None}
    model.pretrained_cfg = model.pretrained_cfg | given
    difference = difference_from_checkpoint(spec, model)
    if difference:
        click.echo(f"warning: target: {difference}; see --img-size, --mean and --std", err=True)
    return model
