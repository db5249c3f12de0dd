"""``tinydrop fit-guidance``, which writes a guidance model for the target's classes to a folder."""

from pathlib import Path

import click

from tinydrop_kernels.checkpoints import check_spec, class_names, load_model
from tinydrop_kernels.cli.options import (
    BATCH_SIZE,
    DEVICE,
    DTYPE,
    IMG_SIZE,
    TARGET,
    WORKERS,
    dtype_of,
    guidances,
    tell_skipped,
    usable,
)
from tinydrop_kernels.cli.target import load_target
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.guidance.fitting import HELD_OUT, best, fit_each
from tinydrop_kernels.predict.images import image_files
from tinydrop_kernels.predict.loading import FolderBatches, ImageLoader, folder_labels


@click.command("fit-guidance")
@click.argument("images", type=click.Path(exists=True, file_okay=False, path_type=Path))
@TARGET
@guidances("The pretrained backbone")
@IMG_SIZE
@click.option("--no-labels", is_flag=True, help="Ignore the folders' names, and learn from the target's answers alone.")
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the guidance model. It must be new or empty.",
)
@BATCH_SIZE
@DEVICE
@DTYPE
@WORKERS
def fit_guidance(
    images: Path,
    target: str,
    guidance: tuple[str, ...],
    img_size: int | None,
    no_labels: bool,
    out: Path,
    batch_size: int,
    device: str,
    dtype: str,
    workers: int,
) -> None:
    """Fit a guidance model to the target's own answers on your images.

    IMAGES is a folder of images like those that the target will see. They need no labels. Ten or more per class are a
    good start. Subfolders are used as labels if they have the names of the classes, or are as many as the classes and
    sorted in their order. The backbone stays as it is. Only a linear head is fitted.

    The result is a folder for `--guidance` of the other commands and `tdk.patch(model, guidance="FOLDER")`.

    \b
    Examples:
      tinydrop fit-guidance photos/ --target my_vit/ --out my_guidance/
      tinydrop fit-guidance photos/ --target my_vit/ --guidance mobilenetv2_100.ra_in1k \\
          --guidance resnet18.a1_in1k --out my_guidance/
      tinydrop classify photos/ --target my_vit/ --guidance my_guidance/
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ValueError(f"out: {str(out)!r} has files in it, expected a new or an empty folder")
        check_spec(target, "target")
        backbones = [load_model(spec, "guidance") for spec in guidance]
        vit = load_target(target, img_size, None).to(usable(device), dtype_of(dtype, device))
        files = image_files([images], lambda path, reason: tell_skipped(str(path), reason))
        labels = None if no_labels else folder_labels(images, files, class_names(vit, count_classes(vit)))
        by = "the target's answers and the folders' labels" if labels else "the target's answers alone"
        click.echo(f"{len(files)} images; the guidance model learns from {by}")
        batches = FolderBatches(files, labels, ImageLoader(vit, batch_size, workers, tell_skipped))
        fitted = fit_each(vit, batches, backbones)
        click.echo(f"held-out images with the target's top class ({fitted[0].images // HELD_OUT} images held out):")
        for name, one in zip(guidance, fitted, strict=True):
            click.echo(f"{one.agreement:8.1%} {one.flops / 1e9:8.2f} GFLOPs, weight decay {one.weight_decay:g}  {name}")
        chosen = best(fitted)
        chosen.save(out)
        click.echo(f"saved {guidance[fitted.index(chosen)]} in {click.format_filename(out)}")
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None
