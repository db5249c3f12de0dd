"""A pipeline of batches through a patched model. Guidance of one batch runs beside the target of the batch before."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinydrop_kernels.engine import steps
from tinydrop_kernels.engine.checks import check_eval, check_patched
from tinydrop_kernels.engine.plan import PendingPlan, RunningBatch
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.report import Call


class BatchResult(NamedTuple):
    """The result of one batch."""

    images: Tensor  # as given to the model, on its device and in its dtype
    logits: Tensor  # (batch, classes), the same answers as from a call; a GPU may still be computing them
    call: Call  # what happened to the images


class Pipeline:
    """A patched model that takes an iterable of batches and yields their results in order.

    On a GPU, a batch is copied, guided, selected and packed on one stream, while the target works on the batch before
    on another. Images on the host should be in pinned memory, otherwise their copy waits. A result is yielded once the
    guidance of the next batch has started, so two batches are in memory. This overlap is experimental, because no GPU
    has run it yet. On other devices, batches go through one after the other.

    Args:
        model: a patched model in eval mode.
        overlap: overlap batches. The default is True on a GPU and False elsewhere.

    Attributes:
        overlaps: True if batches overlap.

    Raises:
        ValueError: the model is not patched.

    Example:
        >>> pipeline = tdk.Pipeline(tdk.patch(model, guidance))
        >>> for result in pipeline([images, images[:1]]):
        ...     print(result.logits.shape, len(result.call.counts))
        torch.Size([2, 10]) 2
        torch.Size([1, 10]) 1
    """

    def __init__(self, model: TimmModule, overlap: bool | None = None):
        check_patched(model)
        self._model = model
        device = next(model.parameters()).device
        self.overlaps = device.type == "cuda" if overlap is None else overlap
        self._stream = torch.cuda.Stream(device) if self.overlaps and device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, batches: Iterable[Tensor]) -> Iterator[BatchResult]:
        """Yield the result of each batch.

        Args:
            batches: floating images ``(batch, channels, height, width)``, normalised for the target, at least one per
                batch. They are moved to the model's device and cast to its dtype. A batch on a GPU may still be the
                output of work on the current stream.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError, TypeError: a batch is empty or does not fit the model. The results of all batches before are
                yielded first.
        """
        check_eval(self._model)
        running: RunningBatch | None = None
        if self._stream is not None:  # because weights may still be being copied to the device or cast
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            for batch in batches:
                images, pending = self._asked(batch)
                if running is not None:
                    # Finish only now, because a second look waits for the target. Meanwhile the GPU runs the guidance
                    # of the next batch.
                    ended, running = running, None
                    yield self._finished(ended)
                running = self._started(images, pending)
                if not self.overlaps:
                    ended, running = running, None
                    yield self._finished(ended)
        except Exception:  # from the batch that follows the running one
            if running is not None:
                yield self._finished(running)
            raise
        if running is not None:
            yield self._finished(running)

    def _asked(self, batch: Tensor) -> tuple[Tensor, PendingPlan]:
        if len(batch) == 0:
            raise ValueError("batches: got an empty batch, expected at least one image in each")
        if self._stream is not None and batch.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            batch.record_stream(self._stream)
        with self._aside():
            weight = next(self._model.parameters())
            images = batch.to(weight.device, non_blocking=True).to(weight.dtype)
            self._model.tinydrop.check(images)
            return images, steps.ask(self._model.tinydrop, images)

    def _started(self, images: Tensor, pending: PendingPlan) -> RunningBatch:
        with self._aside():
            plan = steps.decide(self._model.tinydrop, pending)
        if self._stream is not None:
            reader = torch.cuda.current_stream(self._stream.device)
            reader.wait_stream(self._stream)
            pytree.tree_map_only(Tensor, lambda tensor: tensor.record_stream(reader), (images, plan))
        running: RunningBatch = steps.start(self._model.tinydrop, images, plan)
        return running

    def _finished(self, running: RunningBatch) -> BatchResult:
        logits = steps.finish(self._model.tinydrop, running)
        return BatchResult(running.images, logits, self._model.tinydrop.last)

    def _aside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
