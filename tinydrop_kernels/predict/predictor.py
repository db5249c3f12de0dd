"""The predictor, which turns images into rows for the command line, the demo, benchmarks and data pipelines."""

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
    """A classifier of images with a patched model, which also sums up the costs.

    Probabilities come from a softmax over the model's answer. For a model patched with ``multi_label=True`` they are
    the sigmoid scores of the classes.

    The first batch runs at least twice, because the first calls in a process compile and allocate. These warm-up calls
    are not timed.

    Args:
        model: a patched timm classifier in eval mode. Images are moved to its device and dtype.
        batch_size: images per batch.
        workers: processes that load images. With 0, images are loaded in the calling process.
        top: number of classes in each row.
        compare_dense: also run the dense model on the same batches.
        progress: show a progress bar if standard error is a terminal.
        on_unreadable: called with the name and the reason for each image that cannot be read. The default issues a
            warning.

    Attributes:
        report: sum of the reports of all batches; None before the first batch. It includes the time of the patched
            model and, with ``compare_dense``, of the dense model. Loading is not included unless ``overlaps`` is True.
        overlaps: True if loading, guidance and target work on different batches at the same time (:mod:`pipeline`).
            :meth:`predict` does so on a GPU, unless ``compare_dense`` or the timing of stages is on.
        agreeing: number of images with the same top class from the patched and the dense model.
        unreadable: name and reason of each image that could not be read.

    Raises:
        ValueError: the model is not patched, has no classes, or takes neither one channel nor three, or a number is out
            of range.

    Example:
        >>> predictor = tdk.Predictor(tdk.patch(model, guidance), batch_size=2)
        >>> rows = predictor.classify(images).rows
        >>> len(rows), predictor.report.images
        (2, 2)
        >>> for row in tdk.Predictor(model, workers=4).predict(["bee.jpg", "wasp.png"]):  # doctest: +SKIP
        ...     print(row.name, row.top[0].name)
        bee.jpg bee
        wasp.png wasp
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
        """Yield a row for each readable image, in order, as soon as its batch is done.

        Inputs are consumed lazily, so they may be a stream.

        Args:
            inputs: any mix of the forms that :func:`images.load_image` takes: paths, bytes, PIL images and arrays.

        Raises:
            TypeError: ``inputs`` is a single image instead of an iterable of images.
            RuntimeError: the model is in training mode.

        Example:
            >>> from PIL import Image
            >>> predictor = tdk.Predictor(tdk.patch(model, guidance), top=2)
            >>> rows = list(predictor.predict([Image.new("RGB", (64, 48)), Image.new("L", (32, 32))]))
            >>> [(row.name, len(row.top)) for row in rows]
            [('#0', 2), ('#1', 2)]
        """
        return (row for seen in self.batches(inputs) for row in seen.rows)

    def batches(self, inputs: Iterable[ImageSource]) -> Iterator[PredictedBatch]:
        """Yield the results of :meth:`predict` batch by batch, together with the images and the model's call."""
        _refuse_one_image(inputs)
        return self._classified(self._loader(inputs))

    def predict_batch(self, images: Sequence[ImageSource] | np.ndarray) -> list[Prediction | None]:
        """Return one entry per image, in order; None if an image cannot be read.

        Use this method in data pipelines that need one result per input, such as Ray Data's ``map_batches``. Images are
        loaded in the calling process.

        Args:
            images: images as for :meth:`predict`, or an array ``(batch, height, width, 3)``, which may be read-only.

        Raises:
            TypeError: ``images`` is a single image.
            RuntimeError: the model is in training mode.

        Example:
            >>> import numpy as np
            >>> predictor = tdk.Predictor(tdk.patch(model, guidance), on_unreadable=lambda name, reason: None)
            >>> rows = predictor.predict_batch([np.zeros((48, 64, 3), dtype=np.uint8), b"not an image"])
            >>> rows[0].name, rows[1]
            ('#0', None)
        """
        _refuse_one_image(images)
        rows = {row.index: row for seen in self._classified(self._loader(images, workers=0)) for row in seen.rows}
        return [rows.get(index) for index in range(len(images))]

    def _set_aside(self, name: str, reason: str) -> None:
        self.unreadable.append((name, reason))
        self.on_unreadable(name, reason)

    def classify(self, images: Tensor, names: Sequence[str] | None = None) -> PredictedBatch:
        """Classify a batch of tensors that are already normalised for the model.

        Args:
            images: floating ``(batch, channels, height, width)``. They are moved to the model's device and dtype.
            names: names of the images. The default is "#0", "#1" and so on.

        Raises:
            ValueError: the numbers of names and images differ.
            RuntimeError: the model is in training mode.

        Example:
            >>> predictor = tdk.Predictor(tdk.patch(model, guidance))
            >>> batch = predictor.classify(images, names=["bee", "wasp"])
            >>> [row.name for row in batch.rows]
            ['bee', 'wasp']
            >>> batch.call.exited.tolist()  # random weights are never confident
            [False, False]
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

        # No overlap while something is timed, because concurrent work on the device would distort the times.
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
        if len(self.names) != logits.shape[1]:  # the head has been replaced since the last batch
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
