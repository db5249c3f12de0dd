"""``tinydrop``: classify images, and tell what would run how on this machine."""

import importlib.metadata
import json
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import click
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tinydrop_kernels import ops
from tinydrop_kernels.checkpoints import CheckpointError, class_names, load_model
from tinydrop_kernels.families import UnsupportedModelError
from tinydrop_kernels.guidance import DEFAULT_GUIDANCE, GuidanceError
from tinydrop_kernels.patching import patch
from tinydrop_kernels.policy import DropPolicy

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOP = 5


class Tau(click.ParamType):
    """A number, or ``none`` for no early exit."""

    name = "FLOAT|none"

    def convert(self, value, param, ctx):
        if value is None or isinstance(value, float) or value == "none":
            return None if value == "none" else value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'none'", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tinydrop_kernels")
def main():
    """Token dropping for timm's Vision Transformers."""


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--model",
    default="vit_base_patch16_224.augreg2_in21k_ft_in1k",
    show_default=True,
    help="The large ViT: timm name, folder, or NAME=FILE.",
)
@click.option("--guidance", default=DEFAULT_GUIDANCE, show_default=True, help="The tiny classifier, named likewise.")
@click.option("--img-size", type=click.IntRange(min=1), help="Input size of the large ViT, if not its own.")
@click.option(
    "--tau",
    type=Tau(),
    default=DropPolicy.tau,
    show_default=True,
    help="Exit above this confidence; 'none' never exits.",
)
@click.option(
    "--gamma", type=float, default=DropPolicy.gamma, show_default=True, help="Curvature: low drops aggressively."
)
@click.option(
    "--min-keep", type=float, default=DropPolicy.min_keep, show_default=True, help="Least fraction of patches kept."
)
@click.option("--keep-ratio", type=float, help="Keep this fraction of every image, whatever the confidence.")
@click.option("--summary", is_flag=True, help="One token more: the mean of the dropped patches.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that load images.")
@click.option("--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="A JSON line per image.")
@click.option("--compare-dense", is_flag=True, help="Run the dense model on the same batches too.")
def classify(
    paths,
    model,
    guidance,
    img_size,
    tau,
    gamma,
    min_keep,
    keep_ratio,
    summary,
    batch_size,
    device,
    dtype,
    workers,
    out,
    compare_dense,
):
    """Classify images: files, and all images in folders."""
    try:
        if keep_ratio is None:
            policy = DropPolicy(tau, gamma, min_keep, summary)
        else:
            policy = DropPolicy.fixed(keep_ratio, tau, summary)
        if out and not out.parent.is_dir():
            raise ValueError(f"out: there is no folder {str(out.parent)!r}")
        vit = load_model(model, **({"img_size": img_size} if img_size else {})).to(usable(device), DTYPES[dtype])
        patch(vit, guidance, policy)
    except (ValueError, CheckpointError, UnsupportedModelError, GuidanceError) as error:
        raise click.ClickException(str(error)) from None
    config = resolve_model_data_config(vit)
    if img_size:
        config["input_size"] = (vit.in_chans, img_size, img_size)
    files = ImageFiles(image_files(paths), create_transform(**config))
    if not files.paths:
        raise click.ClickException(f"no image in {', '.join(map(str, paths))}")

    names = class_names(vit)
    tally = Tally(compare_dense)
    loader = DataLoader(files, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    with torch.inference_mode(), out.open("w") if out else nullcontext(sys.stdout) as lines:
        with tqdm(total=len(files), unit="image", disable=None) as bar:
            for batch in loader:
                for path, reason in batch.unreadable:
                    tqdm.write(f"skipped {path}: {reason}", file=sys.stderr)
                    tally.unreadable += 1
                if batch.paths:
                    for row in classified(vit, names, batch, tally):
                        print(json.dumps(row), file=lines)
                bar.update(len(batch.paths) + len(batch.unreadable))
        click.echo(tally.summary(device, dtype), err=out is None)
    if not tally.images:
        raise click.ClickException("no image could be read")


def usable(device: str) -> torch.device:
    """The device, or ValueError where this machine has none such."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device: got {device!r}: {str(error).splitlines()[0]}") from None
    return torch.device(device)


class ImageFiles(Dataset):
    """Path and transformed image, or path and the reason why it cannot be read."""

    def __init__(self, paths: list[Path], transform):
        self.paths = paths
        self.transform = transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return path, self.transform(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise whatever they meet
            return path, str(error) or type(error).__name__


class Batch:
    """The readable images of a batch as one tensor, and the others."""

    def __init__(self, items):
        readable = [(path, image) for path, image in items if isinstance(image, torch.Tensor)]
        self.paths = [path for path, _ in readable]
        self.images = torch.stack([image for _, image in readable]) if readable else torch.empty(0)
        self.unreadable = [(path, reason) for path, reason in items if isinstance(reason, str)]


def collate(items) -> Batch:
    return Batch(items)


def image_files(paths) -> list[Path]:
    """The files named, and those in the folders named whose ending Pillow knows, sorted."""
    endings = Image.registered_extensions()
    found: list[Path] = []
    for path in paths:
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
            if path.is_dir()
            else [path]
        )
        found += inside
    return found


def classified(vit, names: list[str], batch: Batch, tally: "Tally"):
    """Run one batch, tally it, and yield a row for each image."""
    weight = next(vit.parameters())
    images = batch.images.to(weight.device, weight.dtype)

    def dense_forward(x):
        return vit.forward_head(vit.forward_features(x))

    if not tally.images:  # the first calls of a process set things up; they are not timed
        vit(images)
        if tally.compare_dense:
            dense_forward(images)
    logits, seconds = timed(vit, images)
    last, report = vit.tinydrop.last, vit.tinydrop.report()
    dense_top = None
    if tally.compare_dense:
        dense, dense_seconds = timed(dense_forward, images)
        dense_top = dense.argmax(1).tolist()
        tally.agreeing += int((dense.argmax(1) == logits.argmax(1)).sum())
        tally.dense_seconds += dense_seconds
    tally.add(report, last, seconds)

    probability, top = logits.float().softmax(1).topk(min(TOP, logits.shape[1]))
    for i, path in enumerate(batch.paths):
        row = {
            "path": str(path),
            "exit": bool(last.exited[i]),
            "confidence": round(last.confidence[i].item(), 4),
            "kept": int(last.counts[i]),
            "of": last.num_patches,
            "top": [
                {"class": c, "name": names[c], "probability": round(p, 4)}
                for c, p in zip(top[i].tolist(), probability[i].tolist(), strict=True)
            ],
        }
        if dense_top is not None:
            row["dense"] = {"class": dense_top[i], "name": names[dense_top[i]]}
        yield row


def timed(call, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The answer and the seconds it took, the device's work included."""
    start = time.perf_counter()
    answer = call(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return answer, time.perf_counter() - start


class Tally:
    """What came together over all batches."""

    def __init__(self, compare_dense: bool):
        self.compare_dense = compare_dense
        self.images = self.unreadable = self.exits = self.agreeing = self.kept = self.patches = 0
        self.flops = self.dense_flops = 0
        self.seconds = self.dense_seconds = 0.0

    def add(self, report, last, seconds: float) -> None:
        self.images += report.images
        self.exits += report.exits
        self.kept += int(last.counts.sum())
        self.patches += (report.images - report.exits) * last.num_patches
        self.flops += report.flops
        self.dense_flops += report.dense_flops
        self.seconds += seconds

    def summary(self, device: str, dtype: str) -> str:
        if not self.images:
            return f"images       0, unreadable {self.unreadable}"
        keep = f"{self.kept / self.patches:.1%}" if self.patches else "none stayed"
        lines = [
            f"images       {self.images}, unreadable {self.unreadable}",
            f"exits        {self.exits} ({self.exits / self.images:.1%})",
            f"mean keep    {keep} (of the patches of images that stayed)",
            f"FLOPs saved  {1 - self.flops / self.dense_flops:.1%} (guidance counted)",
            f"images/s     {self.images / self.seconds:.1f} ({device}, {dtype}; models only, guidance counted)",
        ]
        if self.compare_dense:
            lines += [
                f"dense        {self.images / self.dense_seconds:.1f} images/s",
                f"speed-up     {self.dense_seconds / self.seconds:.2f} x",
                f"agreement    {self.agreeing / self.images:.1%} of the top classes",
            ]
        return "\n".join(lines)


@main.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def info(device):
    """Versions, device, and what each operator would run."""
    try:
        kind = usable(device).type
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    for package in ("tinydrop_kernels", "torch", "timm", "triton"):
        try:
            click.echo(f"{package:22s}{importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            click.echo(f"{package:22s}not installed")
    click.echo(f"{'python':22s}{platform.python_version()}")
    name = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda") and torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    click.echo(f"{'device':22s}{device} ({name})")
    try:
        backends = {operator: ops.choose_backend(kind) for operator in ops.OPERATORS}
        attention = ops.attention_backends.first_on(kind)
        if attention.name != backends["varlen_attention"][0]:  # it has more to choose from than the others
            backends["varlen_attention"] = (attention.name, attention.what)
    except (ValueError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    for operator, (backend, reason) in backends.items():
        click.echo(f"{operator:22s}{backend}: {reason}")
    click.echo(f"{'CUDA C++ extension':22s}{'built' if ops.cuda.available() else ops.cuda.WHY_NOT}")


if __name__ == "__main__":
    main()
