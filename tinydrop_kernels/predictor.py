"""Images in, rows out: what the command line, the demo, benchmarks and data pipelines share."""

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tinydrop_kernels.checkpoints import class_names
from tinydrop_kernels.images import MODES, ImageSource, image_transform, load_image
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.report import Call, Report

T = TypeVar("T")


class Candidate(NamedTuple):
    """A class that the image may be of."""

    label: int  # its number
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a patched model said of one image, and what it looked at to say so."""

    index: int  # place among the inputs
    name: str  # the path; "#index" for an image that came without one
    exited: bool  # answered by the guidance model alone
    confidence: float  # the guidance model's
    kept: int  # patches that went through the target; 0 if the image exited
    patches: int  # of the dense image
    grid: tuple[int, int]  # rows and columns of which the patches were kept
    second_look: bool  # went through the dense model after all
    top: tuple[Candidate, ...]  # most probable first
    dense: Candidate | None = None  # the dense model's first, if it was asked

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, valid JSON: fractions rounded to four digits, null for what is not finite."""
        row = {
            "path": self.name,
            "exit": self.exited,
            "confidence": _rounded(self.confidence),
            "kept": self.kept,
            "of": self.patches,
            "grid": list(self.grid),
            "second_look": self.second_look,
            "top": [_candidate_as_dict(candidate) for candidate in self.top],
        }
        return row | ({"dense": _candidate_as_dict(self.dense)} if self.dense else {})


class Predictor:
    """Classifies images with a patched model and keeps account.

    The first batch goes through twice, because the first call of a process sets things up; that call is not timed.

    Args:
        model: a patched timm classifier in eval mode. Its device and dtype are used.
        batch_size: images that go through the model together.
        workers: processes that load images; 0 loads them in this one.
        top: classes in each row.
        compare_dense: run the model without dropping on the same batches, too.
        progress: show a progress bar, where standard error is a terminal.
        on_unreadable: called with name and reason of each image that cannot be read; by default a warning is issued.

    Attributes:
        report: sum of the reports of all batches; None before the first.
        seconds, dense_seconds: time that the patched and the dense model took, without the loading of images.
        agreeing: images of which both models had the same first class.
        unreadable: name and reason of each image that could not be read.

    Raises:
        ValueError: the model is not patched, has no classes, or takes neither one channel nor three; or a number is out
            of range.
    """

    def __init__(
        self,
        model: TimmModule,
        *,
        batch_size: int = 32,
        workers: int = 0,
        top: int = 5,
        compare_dense: bool = False,
        progress: bool = False,
        on_unreadable: Callable[[str, str], None] | None = None,
    ):
        if not hasattr(model, "tinydrop"):
            raise ValueError(
                f"model: this {type(model).__name__} is not patched; call tinydrop_kernels.patch on it first"
            )
        check_classifier(model)
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("top", top, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected a number >= {least}")
        self.model = model
        self.batch_size = batch_size
        self.workers = workers
        self.top = top
        self.compare_dense = compare_dense
        self.progress = progress
        self.on_unreadable = on_unreadable or _warn
        self.names = class_names(model)
        self.report: Report | None = None
        self.seconds = self.dense_seconds = 0.0
        self.agreeing = 0
        self.unreadable: list[tuple[str, str]] = []
        self._images = _Images(image_transform(model), getattr(model, "in_chans", 3))

    def predict(self, inputs: Iterable[ImageSource]) -> Iterator[Prediction]:
        """A row for each readable image, in order, as the batches are done. Inputs are taken as they are needed.

        Args:
            inputs: paths, bytes, PIL images or arrays, mixed as one likes (:func:`images.load_image` says which).

        Raises:
            TypeError: the inputs are one image, where many are expected.
            RuntimeError: the model is in training mode.
        """
        _refuse_one_image(inputs)
        return self._rows(inputs, self.workers)

    def predict_batch(self, images: Sequence[ImageSource] | np.ndarray) -> list[Prediction | None]:
        """One entry for each image, in order; None for what cannot be read. Images are loaded in this process.

        This is for data pipelines that hand over batches and want their columns to stay aligned, such as Ray Data's
        ``map_batches``.

        Args:
            images: as for :meth:`predict`, such as an array ``(batch, height, width, 3)``, which may be read-only.
        """
        _refuse_one_image(images)
        rows = {row.index: row for row in self._rows(images, workers=0)}
        return [rows.get(index) for index in range(len(images))]

    def _rows(self, inputs: Iterable[ImageSource], workers: int) -> Iterator[Prediction]:
        # The sampler draws the inputs themselves, not their numbers: so they may be a stream.
        loader = DataLoader(
            self._images,
            batch_size=self.batch_size,
            sampler=enumerate(inputs),
            num_workers=workers,
            collate_fn=_collate,
        )
        total = len(inputs) if isinstance(inputs, Sized) else None
        with tqdm(total=total, unit="image", disable=None if self.progress else True) as bar:
            for batch in loader:
                for name, reason in batch.unreadable:
                    self.unreadable.append((name, reason))
                    self.on_unreadable(name, reason)
                if batch.images is not None:
                    yield from self._classify(batch.images, batch.indices, batch.names)
                bar.update(len(batch.names) + len(batch.unreadable))

    @torch.inference_mode()
    def _classify(self, images: Tensor, indices: list[int], names: list[str]) -> list[Prediction]:
        model = self.model
        if model.training:
            raise RuntimeError("model: it is in training mode, in which it drops nothing; call model.eval() first")
        weight = next(model.parameters())
        images = images.to(weight.device, weight.dtype)
        if self.report is None:
            model(images)
            if self.compare_dense:
                model.tinydrop.dense(images)
        logits, seconds = timed(model, images)
        call, report = model.tinydrop.last, model.tinydrop.report()
        self.report = report if self.report is None else self.report + report
        self.seconds += seconds
        probabilities = logits.float().softmax(1)
        dense: list[Candidate | None] = [None] * len(images)
        if self.compare_dense:
            dense_logits, seconds = timed(model.tinydrop.dense, images)
            self.dense_seconds += seconds
            self.agreeing += int((dense_logits.argmax(1) == logits.argmax(1)).sum())
            dense = [first for first, *_ in self._candidates(dense_logits.float().softmax(1), 1)]
        candidates = self._candidates(probabilities, min(self.top, probabilities.shape[1]))
        return list(_predictions(indices, names, call, candidates, dense))

    def _candidates(self, probabilities: Tensor, top: int) -> list[tuple[Candidate, ...]]:
        values, classes = (tensor.tolist() for tensor in probabilities.topk(top))
        return [
            tuple(Candidate(c, self.names[c], p) for c, p in zip(row, ps, strict=True))
            for row, ps in zip(classes, values, strict=True)
        ]


def check_classifier(model: TimmModule) -> None:
    """Raise ValueError if a model has no classes."""
    if not getattr(model, "num_classes", 0):
        raise ValueError("model: got one without classes (num_classes=0), expected a classifier")


def _predictions(
    indices: list[int],
    names: list[str],
    call: Call,
    candidates: list[tuple[Candidate, ...]],
    dense: list[Candidate | None],
) -> Iterator[Prediction]:
    columns = (call.exited.tolist(), call.confidence.tolist(), call.counts.tolist(), call.second_look.tolist())
    for i, (exited, confidence, kept, second_look) in enumerate(zip(*columns, strict=True)):
        yield Prediction(
            index=indices[i],
            name=names[i],
            exited=exited,
            confidence=confidence,
            kept=kept,
            patches=call.num_patches,
            grid=call.grid_sizes[i],
            second_look=second_look,
            top=candidates[i],
            dense=dense[i],
        )


class _Images(Dataset[Any]):
    """Loads an input that comes with its number; in place of the image, why it could not be read."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], channels: int):
        self.transform = transform
        self.channels = channels

    def __getitem__(self, numbered: tuple[int, ImageSource]) -> tuple[int, str, Tensor | str]:
        index, source = numbered
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "filename", "")
        name = str(name) or f"#{index}"
        try:
            return index, name, self.transform(load_image(source, self.channels))
        except Exception as error:  # Pillow's decoders raise whatever they meet
            return index, name, str(error) or type(error).__name__


class _Batch(NamedTuple):
    """The readable images of a batch as one tensor, None if there is none, and the others."""

    images: Tensor | None
    indices: list[int]
    names: list[str]
    unreadable: list[tuple[str, str]]


def _collate(items: list[tuple[int, str, Tensor | str]]) -> _Batch:
    readable = [(index, name, image) for index, name, image in items if isinstance(image, Tensor)]
    return _Batch(
        torch.stack([image for _, _, image in readable]) if readable else None,
        [index for index, _, _ in readable],
        [name for _, name, _ in readable],
        [(name, reason) for _, name, reason in items if isinstance(reason, str)],
    )


def _refuse_one_image(inputs: object) -> None:
    one = isinstance(inputs, str | os.PathLike | bytes | Image.Image)
    if isinstance(inputs, np.ndarray) and np.issubdtype(inputs.dtype, np.number):
        one = inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[2] in MODES)
    if one:
        raise TypeError(f"inputs: got one {type(inputs).__name__}, expected an iterable of images; put it in a list")


def timed(call: Callable[[Tensor], T], images: Tensor) -> tuple[T, float]:
    """What a call with the images returns, and the seconds it took, the work of their device included."""

    def synchronize() -> None:
        if images.device.type != "cpu":
            torch.accelerator.synchronize(images.device)

    synchronize()
    start = time.perf_counter()
    answer = call(images)
    synchronize()
    return answer, time.perf_counter() - start


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"skipped {name}: {reason}", stacklevel=3)


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _candidate_as_dict(candidate: Candidate) -> dict[str, Any]:
    return {"class": candidate.label, "name": candidate.name, "probability": _rounded(candidate.probability)}
