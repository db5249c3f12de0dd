"""``tinydrop calibrate``, which writes a certified policy file for given images and a stated accuracy drop."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tinydrop_kernels.calibration.answers import COSTS, Answers, gather
from tinydrop_kernels.calibration.frontier import check_drawable, draw, frontier, write_csv
from tinydrop_kernels.checkpoints import check_spec, class_names, load_model
from tinydrop_kernels.cli.interruption import INTERRUPTED
from tinydrop_kernels.cli.options import (
    BATCH_SIZE,
    DEVICE,
    DTYPE,
    IMG_SIZE,
    TARGET,
    WORKERS,
    check_writable,
    dtype_of,
    guidances,
    tell_skipped,
    usable,
    with_options,
)
from tinydrop_kernels.cli.target import CLASSES_AND_IMAGES, load_target
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.policy.calibrated import CalibratedPolicy
from tinydrop_kernels.predict.images import image_files
from tinydrop_kernels.predict.loading import FolderBatches, ImageLoader, folder_labels


@click.command()
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@TARGET
@guidances("The tiny classifier")
@IMG_SIZE
@with_options(CLASSES_AND_IMAGES)
@click.option(
    "--accuracy-drop",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    multiple=True,
    default=(0.5,),
    metavar="POINTS",
    help="Accuracy that may be lost, in percentage points. Repeat the option to write several policy files.",
)
@click.option(
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.9,
    help="Probability with which the certificate holds.",
)
@click.option(
    "--cost", type=click.Choice(COSTS), default="flops", help="Cost to save. Time is measured on this machine."
)
@click.option(
    "--no-labels", is_flag=True, help="Ignore the folders' names, and certify agreement with the dense model."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="policy.json",
    help="The policy file. With several drops, each file name ends in its drop, as in policy-0.5.json.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw accuracy against cost to this file (.png, .svg), or list it (.csv).",
)
@click.option("--random-drop", is_flag=True, help="Add a baseline to the picture that keeps random patches.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps the models' answers, so that no image runs twice.  [default: ~/.cache/tinydrop_kernels]",
)
@BATCH_SIZE
@DEVICE
@DTYPE
@WORKERS
@click.pass_context
def calibrate(
    context: click.Context,
    /,
    data: Path,
    target: str,
    guidance: tuple[str, ...],
    img_size: int | None,
    classes: list[str] | None,
    accuracy_drop: tuple[float, ...],
    confidence: float,
    cost: str,
    no_labels: bool,
    out: Path,
    picture: Path | None,
    random_drop: bool,
    cache: Path | None,
    batch_size: int,
    device: str,
    dtype: str,
    workers: int,
    **preprocessing: Any,
) -> None:
    """Find the cheapest policy with a certified limit on its accuracy loss.

    DATA is a folder of images that the models were not trained on. With one subfolder per class, the accuracy is
    measured. The subfolders have the names of the classes, or are as many as the classes and sorted in their order.
    Otherwise the agreement with the dense model is measured.

    The result is a policy file for `tinydrop classify --policy` and `tdk.patch(model, policy="policy.json")`. After an
    interruption, run the same command again to continue.

    \b
    Examples:
      tinydrop calibrate photos/ --accuracy-drop 0.5 --out policy.json
      tinydrop calibrate photos/ --accuracy-drop 0.3 --accuracy-drop 1 --picture frontier.png
    """
    try:
        _check_outputs(out, picture)
        target_device = usable(device)
        check_spec(target, "target")
        small = [load_model(spec, "guidance") for spec in guidance]
        vit = load_target(target, img_size, classes, **preprocessing).to(target_device, dtype_of(dtype, device))
        files = image_files([data], lambda path, reason: tell_skipped(str(path), reason))
        labels = None if no_labels else folder_labels(data, files, class_names(vit, count_classes(vit)))
        by = (
            "accuracy" if labels else "agreement with the dense model, which bounds the accuracy lost (no labels found)"
        )
        click.echo(f"{len(files)} images, judged by {by}")
        batches = FolderBatches(files, labels, ImageLoader(vit, batch_size, workers, tell_skipped))
        cache = cache or default_cache()
        answers = gather(vit, small, batches, cache=cache, names=batches.read, random_drop=random_drop)
        policies = [_best(answers, drop / 100, confidence, cost, guidance) for drop in accuracy_drop]
        for drop, policy in zip(accuracy_drop, policies, strict=True):
            path = out if len(policies) == 1 else out.with_name(f"{out.stem}-{drop:g}{out.suffix}")
            policy.save(path)
            click.echo(f"\nPolicy to lose at most {drop:g} points: {click.format_filename(path)}\n{policy}")
        if picture:
            _show(answers, policies, picture, guidance)
    except KeyboardInterrupt:
        click.echo("interrupted; run the same command again to continue", err=True)
        context.exit(INTERRUPTED)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _check_outputs(out: Path, picture: Path | None) -> None:
    """Raise an error if an output cannot be written, before the models run for hours."""
    for option, path in (("out", out), ("picture", picture)):
        if path:
            check_writable(option, path)
    if picture and picture.suffix not in (".png", ".svg", ".csv"):
        raise ValueError(f"picture: got {str(picture)!r}, expected a name that ends in .png, .svg or .csv")
    if picture and picture.suffix != ".csv":
        check_drawable()


def default_cache() -> Path:
    """Return the default folder for the models' answers."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinydrop_kernels"


def _best(answers: Answers, drop: float, confidence: float, cost: str, guidance: Sequence[str]) -> CalibratedPolicy:
    """Return the cheapest policy of all guidance models. Print a comparison if there are several."""
    policies = answers.compared(drop, confidence, cost=cost)
    best = min(policies, key=lambda policy: policy.cost)
    if len(policies) > 1:
        click.echo(f"\nTo lose at most {100 * drop:g} points, best policy of each guidance model ({cost} saved):")
        for name, policy in sorted(zip(guidance, policies, strict=True), key=lambda pair: pair[1].cost):
            told = f"{1 - policy.cost:8.1%}  certified" if policy.certificate.passed else "          nothing certified"
            click.echo(f"{told}  {name}")
        passed = [name for name, policy in zip(guidance, policies, strict=True) if policy is best]
        click.echo(f"Take {passed[0]}." if best.certificate.passed else "Take none of them.")
    return best


def _show(answers: Answers, policies: Sequence[CalibratedPolicy], picture: Path, guidance: Sequence[str]) -> None:
    for number, name in enumerate(guidance):
        own = [policy for policy in policies if policy.guidance == answers.guidances[number]]
        path = picture if len(guidance) == 1 else picture.with_name(f"{picture.stem}-{number + 1}{picture.suffix}")
        table = answers.of_guidance(number)
        points = frontier(table, own)
        if path.suffix == ".csv":
            write_csv(points, path)
        else:
            draw(points, path, table)
        click.echo(f"frontier of {name}: {click.format_filename(path)}")
