"""Batch after batch through a patched model, the guidance of one beside the target of the one before."""

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
    """A batch that has been through."""

    images: Tensor  # as the model took them, on its device
    logits: Tensor  # (batch, classes), on the scale of a call's answer; on a GPU they may still be on their way
    call: Call  # what happened to them


class Pipeline:
    """Call it with batches of images; it hands out their answers, in order.

    On a GPU, guidance, selection and packing of a batch run on a stream of their own beside the target's work on the
    batch before, and so does the copy of images that come from the host (pinned memory, or it waits); loading goes on
    beside both. An answer comes when the guidance of the next batch is at work, so two batches are in memory. This
    overlap is experimental, since no GPU has run it yet. On other devices, batches go through one after the other.

    Args:
        model: patched, in eval mode.
        overlap: whether they overlap; by default where the device has streams. False is the plain way.

    Attributes:
        overlaps: whether they do.

    Raises:
        ValueError: the model is not patched.
    """

    def __init__(self, model: TimmModule, overlap: bool | None = None):
        check_patched(model)
        self._model = model
        device = next(model.parameters()).device
        self.overlaps = device.type == "cuda" if overlap is None else overlap
        self._stream = torch.cuda.Stream(device) if self.overlaps and device.type == "cuda" else None

    @torch.inference_mode()
    def __call__(self, batches: Iterable[Tensor]) -> Iterator[BatchResult]:
        """Answers to batches ``(batch, channels, height, width)``, normalised for the target.

        Args:
            batches: floating, of at least one image each; moved to the model's device and cast to its dtype. Those on a
                GPU already wait for what has been started on it before.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError, TypeError: images that the model does not take, or a batch of none; behind the answers to all
                batches before.
        """
        check_eval(self._model)
        running: RunningBatch | None = None
        if self._stream is not None:  # weights may be on their way to the device, or to another dtype
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            for batch in batches:
                images, pending = self._asked(batch)
                if running is not None:  # its second look waits for the target: by now the next guidance is at work
                    ended, running = running, None
                    yield self._finished(ended)
                running = self._started(images, pending)
                if not self.overlaps:
                    ended, running = running, None
                    yield self._finished(ended)
        except Exception:  # of the batch behind
            if running is not None:
                yield self._finished(running)
            raise
        if running is not None:
            yield self._finished(running)

    def _asked(self, batch: Tensor) -> tuple[Tensor, PendingPlan]:
        if len(batch) == 0:
            raise ValueError("batches: got one of no images, expected at least one")
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
