"""Images in, rows out: what the command line, the demo, benchmarks and data pipelines share."""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinydrop_kernels.checkpoints import class_names
from tinydrop_kernels.engine.checks import check_classifier, check_eval, check_patched
from tinydrop_kernels.engine.pipeline import BatchResult, Pipeline
from tinydrop_kernels.engine.stopwatch import timed, wait_for, warm_up_calls
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.predict.images import MODES, ImageSource
from tinydrop_kernels.predict.loading import ImageLoader, LoadedBatch
from tinydrop_kernels.predict.prediction import Candidate, PredictedBatch, Prediction, predictions
from tinydrop_kernels.report import Report


class Predictor:
    """Classifies images with a patched model and keeps account.

    Probabilities are of a softmax over the model's answer; of one patched with ``multi_label=True`` they are the scores
    of its sigmoids, each class by itself.

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
        report: sum of the reports of all batches, with the time that the patched model took and, if it was asked, the
            dense one, both without the loading of images unless they overlap; None before the first.
        overlaps: whether a batch was loaded and guided beside the target's work on another (:mod:`pipeline`), as on a
            GPU where nothing is timed by itself; then the time is that of all together.
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
        check_patched(model)
        check_classifier(model.tinydrop.num_classes)
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
        self.names = class_names(model, model.tinydrop.num_classes)
        self.report: Report | None = None
        self.agreeing = 0
        self.overlaps = False
        self.unreadable: list[tuple[str, str]] = []
        is_on_gpu = next(model.parameters()).is_cuda
        self._loader = ImageLoader(model, batch_size, workers, self._set_aside, progress, is_on_gpu)

    def predict(self, inputs: Iterable[ImageSource]) -> Iterator[Prediction]:
        """A row for each readable image, in order, as the batches are done. Inputs are taken as they are needed.

        Args:
            inputs: paths, bytes, PIL images or arrays, mixed as one likes (:func:`images.load_image` says which).

        Raises:
            TypeError: the inputs are one image, where many are expected.
            RuntimeError: the model is in training mode.
        """
        return (row for seen in self.batches(inputs) for row in seen.rows)

    def batches(self, inputs: Iterable[ImageSource]) -> Iterator[PredictedBatch]:
        """The same batch by batch, with the images as they went in and what happened to them."""
        _refuse_one_image(inputs)
        return self._classified(self._loader(inputs))

    def predict_batch(self, images: Sequence[ImageSource] | np.ndarray) -> list[Prediction | None]:
        """One entry for each image, in order; None for what cannot be read. Images are loaded in this process.

        This is for data pipelines that hand over batches and want their columns to stay aligned, such as Ray Data's
        ``map_batches``.

        Args:
            images: as for :meth:`predict`, such as an array ``(batch, height, width, 3)``, which may be read-only.
        """
        _refuse_one_image(images)
        rows = {row.index: row for seen in self._classified(self._loader(images, workers=0)) for row in seen.rows}
        return [rows.get(index) for index in range(len(images))]

    def _set_aside(self, name: str, reason: str) -> None:
        self.unreadable.append((name, reason))
        self.on_unreadable(name, reason)

    def classify(self, images: Tensor, names: Sequence[str] | None = None) -> PredictedBatch:
        """A batch ``(batch, channels, height, width)`` that is normalised for the model already.

        Args:
            images: floating; cast to the model's dtype and moved to its device.
            names: of the images; by default "#0", "#1" and so on.

        Raises:
            ValueError: not as many names as images.
            RuntimeError: the model is in training mode.
        """
        names = [f"#{i}" for i in range(len(images))] if names is None else list(names)
        if len(names) != len(images):
            raise ValueError(f"names: got {len(names)}, expected {len(images)}, one for each image")
        (seen,) = self._classified([LoadedBatch(images, list(range(len(images))), names)], overlap=False)
        return seen

    def _classified(self, batches: Iterable[LoadedBatch], overlap: bool | None = None) -> Iterator[PredictedBatch]:
        check_eval(self.model)
        tinydrop, begun = self.model.tinydrop, deque[tuple[LoadedBatch, float]]()

        def images() -> Iterator[Tensor]:
            for batch in batches:
                if self.report is None and not begun:
                    self._warm_up(batch.images)
                begun.append((batch, time.perf_counter()))
                yield batch.images

        # What is timed must have the device to itself.
        pipeline = Pipeline(self.model, overlap=False if self.compare_dense or tinydrop.timed else overlap)
        self.overlaps = pipeline.overlaps
        last_end = 0.0
        for answered in pipeline(images()):
            batch, start = begun.popleft()
            wait_for(answered.logits)
            end = time.perf_counter()
            yield self._seen(batch, answered, seconds=end - max(start, last_end))
            last_end = end

    @torch.inference_mode()
    def _warm_up(self, images: Tensor) -> None:
        weight = next(self.model.parameters())
        images = images.to(weight.device, weight.dtype)
        for _ in range(warm_up_calls(self.model)):
            self.model(images)
        if self.compare_dense:
            self.model.tinydrop.dense(images)
        wait_for(images)

    @torch.inference_mode()
    def _seen(self, batch: LoadedBatch, answered: BatchResult, seconds: float) -> PredictedBatch:
        images, logits, call = answered
        tinydrop = self.model.tinydrop
        if len(self.names) != logits.shape[1]:  # the head was replaced meanwhile
            self.names = class_names(self.model, logits.shape[1])
        report = replace(tinydrop.report(call), wall_seconds=seconds)
        dense: Sequence[Candidate | None] = [None] * len(images)
        guidance = dense
        if call.guidance_logits.shape[1] == logits.shape[1]:
            guidance = self._first(call.guidance_logits)
        if self.compare_dense:
            dense_logits, dense_seconds = timed(tinydrop.dense, images)
            report = replace(report, dense_seconds=dense_seconds)
            dense = self._first(dense_logits)
            self.agreeing += int((dense_logits.argmax(1) == logits.argmax(1)).sum())
        self.report = report if self.report is None else self.report + report
        candidates = self._candidates(logits, self.top)
        return PredictedBatch(
            images, call, list(predictions(batch.indices, batch.names, call, candidates, guidance, dense))
        )

    def _first(self, logits: Tensor) -> list[Candidate]:
        return [first for first, *_ in self._candidates(logits, 1)]

    def _candidates(self, logits: Tensor, top: int) -> list[tuple[Candidate, ...]]:
        probabilities = logits.float().sigmoid() if self.model.tinydrop.multi_label else logits.float().softmax(1)
        values, classes = (tensor.tolist() for tensor in probabilities.topk(min(top, probabilities.shape[1])))
        return [
            tuple(Candidate(c, self.names[c], p) for c, p in zip(row, ps, strict=True))
            for row, ps in zip(classes, values, strict=True)
        ]


def _refuse_one_image(inputs: object) -> None:
    one = isinstance(inputs, str | os.PathLike | bytes | Image.Image)
    if isinstance(inputs, np.ndarray) and np.issubdtype(inputs.dtype, np.number):
        one = inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[2] in MODES)
    if one:
        raise TypeError(f"inputs: got one {type(inputs).__name__}, expected an iterable of images; put it in a list")


def _warn(name: str, reason: str) -> None:
    warnings.warn(f"skipped {name}: {reason}", stacklevel=3)
