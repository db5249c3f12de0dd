"""``tinydrop calibrate``: from images and a stated accuracy drop to a policy file, in words, and a picture."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tinydrop_kernels.calibration.answers import COSTS, Answers, gather
from tinydrop_kernels.calibration.frontier import check_drawable, draw, frontier, write_csv
from tinydrop_kernels.checkpoints import check_spec, class_names, load_model
from tinydrop_kernels.cli.options import DEFAULT_DEVICE, DEFAULT_MODEL, DTYPES, tell_skipped, usable
from tinydrop_kernels.engine.checks import check_classifier
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.policy.calibrated import CalibratedPolicy
from tinydrop_kernels.predict.images import image_files, image_transform, load_image


class _Listed(click.Command):
    """A command some of whose options may be given several values at once: ``--guidance A B C``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        listed = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        spread, name, first = [], None, False
        for argument in args:
            if argument.startswith("-") and not _is_number(argument):
                name, first = (argument, True) if argument in listed else (None, False)
            elif name and not first:
                spread.append(name)
            else:
                first = False
            spread.append(argument)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@click.command(cls=_Listed)
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--model", default=DEFAULT_MODEL, help="The large ViT: timm name, folder, or NAME=FILE.")
@click.option(
    "--guidance",
    multiple=True,
    default=(DEFAULT_GUIDANCE,),
    metavar="A [B C]",
    help="The tiny classifier, named likewise; several are compared.",
)
@click.option("--img-size", type=click.IntRange(min=1), help="Input size of the large ViT, if not its own.")
@click.option(
    "--accuracy-drop",
    type=click.FloatRange(0, 100, min_open=True, max_open=True),
    multiple=True,
    default=(0.5,),
    metavar="POINTS [POINTS]",
    help="What may be lost of the dense model's accuracy, in percentage points.",
)
@click.option("--confidence", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.9)
@click.option("--cost", type=click.Choice(COSTS), default="flops", help="What is to be saved; time is measured here.")
@click.option("--no-labels", is_flag=True, help="Do not take the folders' names for classes; bound disagreements.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="policy.json",
    help="The policy file; one for each of several drops.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the frontier (.png, .svg) or list it (.csv).",
)
@click.option("--random-drop", is_flag=True, help="Drop random patches, too, for the picture.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where answers are kept. [default: the user's cache]",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32)
@click.option("--device", default=DEFAULT_DEVICE)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes that load images.")
@click.pass_context
def calibrate(
    context: click.Context,
    /,
    data: Path,
    model: str,
    guidance: tuple[str, ...],
    img_size: int | None,
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
) -> None:
    """Find the cheapest policy that loses no more than is stated, with a certificate.

    DATA comes first: a folder of images that the models were not trained on. If it has a folder for each class, named
    as the classes are or in their order, accuracy is what counts; else it is agreement with the dense model.
    Interrupted, the same command goes on from where it was.
    """
    try:
        _check_outputs(out, picture)
        target_device = usable(device)
        check_spec(model)
        small = [load_model(spec, "guidance") for spec in guidance]
        options: dict[str, Any] = {"img_size": img_size} if img_size else {}
        vit = load_model(model, **options).to(target_device, DTYPES[dtype])
        classes = count_classes(vit)
        check_classifier(classes)
        files = image_files([data], lambda path, reason: tell_skipped(str(path), reason))
        labels = None if no_labels else folder_labels(data, files, class_names(vit, classes))
        by = "accuracy" if labels else "agreement with the dense model, for want of labels; it bounds the accuracy lost"
        click.echo(f"{len(files)} images, judged by {by}")
        batches = _Batches(_Files(files, vit), labels, batch_size, workers)
        cache = cache or default_cache()
        answers = gather(vit, small, batches, cache=cache, names=batches.read, random_drop=random_drop)
        policies = [_best(answers, drop / 100, confidence, cost, guidance) for drop in accuracy_drop]
        for drop, policy in zip(accuracy_drop, policies, strict=True):
            path = out if len(policies) == 1 else out.with_name(f"{out.stem}-{drop:g}{out.suffix}")
            policy.save(path)
            click.echo(f"\nA drop of {drop:g} points at most: {click.format_filename(path)}\n{policy}")
        if picture:
            _show(answers, policies, picture, guidance)
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        context.exit(130)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _check_outputs(out: Path, picture: Path | None) -> None:
    """Refuse what could not be written in the end: nobody should hear of it after an hour."""
    for option, path in (("out", out), ("picture", picture)):
        if path and not os.access(path.resolve().parent, os.W_OK):
            raise ValueError(f"{option}: {str(path)!r} cannot be written: there is no such folder, or it is read-only")
    if picture and picture.suffix not in (".png", ".svg", ".csv"):
        raise ValueError(f"picture: got {str(picture)!r}, expected a name that ends in .png, .svg or .csv")
    if picture and picture.suffix != ".csv":
        check_drawable()


def default_cache() -> Path:
    """Where the answers are kept that no folder was named for."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinydrop_kernels"


def folder_labels(data: Path, files: Sequence[Path], known: Sequence[str]) -> list[int] | None:
    """Return the class of each file: by its folder's name, or by its place where there is a folder for each class.

    Args:
        data: the folder of all.
        files: in it or in folders of it.
        known: names of the classes.

    Returns:
        Numbers of classes, or None where the folders are not those of the classes.
    """
    folders = [file.relative_to(data).parts[0] if file.parent != data else "" for file in files]
    names = sorted(set(folders) - {""})
    if "" in folders or not names:
        return None
    if set(names) <= set(known):
        numbers = {name: known.index(name) for name in names}
    elif len(names) == len(known):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        return None
    return [numbers[folder] for folder in folders]


class _Files(Dataset[Any]):
    """Images as the model wants them, by number; in place of one, why it could not be read."""

    def __init__(self, files: Sequence[Path], model: TimmModule):
        self.files, self.channels, self.transform = files, model.in_chans, image_transform(model)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, self.transform(load_image(self.files[number], self.channels))
        except Exception as error:  # Pillow's decoders raise whatever they meet
            return number, str(error) or type(error).__name__


class _Batches:
    """Batches of those that can be read, with their classes where these are known; ``read`` grows with them."""

    def __init__(self, files: _Files, labels: Sequence[int] | None, batch_size: int, workers: int):
        self.files, self.labels, self.read = files.files, labels, list[str]()
        self.loader = DataLoader(files, batch_size=batch_size, num_workers=workers, collate_fn=list)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for batch in self.loader:
            for number, reason in batch:
                if isinstance(reason, str):
                    tell_skipped(str(self.files[number]), reason)
            readable = [(number, image) for number, image in batch if isinstance(image, Tensor)]
            if not readable:
                continue
            self.read += [str(self.files[number]) for number, _ in readable]
            images, labels = torch.stack([image for _, image in readable]), self.labels
            yield images if labels is None else (images, torch.tensor([labels[number] for number, _ in readable]))


def _best(answers: Answers, drop: float, confidence: float, cost: str, guidance: Sequence[str]) -> CalibratedPolicy:
    """The cheapest of all guidance models, which are told where they are several."""
    policies = answers.compared(drop, confidence, cost=cost)
    best = min(policies, key=lambda policy: policy.cost)
    if len(policies) > 1:
        click.echo(f"\nAt most {100 * drop:g} points, each guidance model at its best ({cost} saved):")
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
