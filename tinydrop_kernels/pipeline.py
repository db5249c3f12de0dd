"""Batch after batch through a patched model, the guidance of one beside the target of the one before."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.plan import Plan, Running
from tinydrop_kernels.report import Call
from tinydrop_kernels.timing import check_eval, check_patched


class Answered(NamedTuple):
    """A batch that has been through."""

    images: Tensor  # as the model took them, on its device
    logits: Tensor  # (batch, classes); on a GPU they may still be on their way
    call: Call  # what happened to them


class Pipeline:
    """Call it with batches of images; it hands out their answers, in order.

    On a GPU, guidance, selection and packing of a batch run on a stream of their own beside the target's work on the
    batch before, and so does the copy of images that come from the host (pinned memory, or it waits); loading goes on
    beside both. An answer comes when the guidance of the next batch is at work, so two batches are in memory. On other
    devices, batches go through one after the other.

    Args:
        model: patched, in eval mode.
        overlap: whether they overlap; by default where the device has streams.

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
    def __call__(self, batches: Iterable[Tensor]) -> Iterator[Answered]:
        """Answers to batches ``(batch, channels, height, width)``, normalised for the target.

        Args:
            batches: floating, of at least one image each; moved to the model's device and cast to its dtype. Those on a
                GPU already wait for what has been started on it before.

        Raises:
            RuntimeError: the model is in training mode.
            ValueError, TypeError: images that the model does not take, or a batch of none.
        """
        check_eval(self._model)
        tinydrop, running = self._model.tinydrop, None
        for batch in batches:
            if len(batch) == 0:
                raise ValueError("batches: got one of no images, expected at least one")
            with self._aside(batch):
                weight = next(self._model.parameters())
                images = batch.to(weight.device, non_blocking=True).to(weight.dtype)
                tinydrop.check(images)
                asked = tinydrop.ask(images)
            if running is not None:  # its second look waits for the target: by now the next guidance is at work
                yield self._finished(running)
            with self._aside(None):
                plan = tinydrop.decide(asked)
            self._hand_over(images, plan)
            running = tinydrop.start(images, plan)
            if not self.overlaps:
                yield self._finished(running)
                running = None
        if running is not None:
            yield self._finished(running)

    def _finished(self, running: Running) -> Answered:
        logits = self._model.tinydrop.finish(running)
        return Answered(running.images, logits, self._model.tinydrop.last)

    def _aside(self, batch: Tensor | None) -> AbstractContextManager[Any]:
        """On the stream of the guidance; a batch that is on the device must have become ready there first."""
        if self._stream is None:
            return nullcontext()
        if batch is not None and batch.is_cuda:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            batch.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    def _hand_over(self, images: Tensor, plan: Plan) -> None:
        """Have their memory live until the target has read it; that it is written, the read-back has waited for."""
        if self._stream is not None:
            reader = torch.cuda.current_stream(self._stream.device)
            pytree.tree_map_only(Tensor, lambda tensor: tensor.record_stream(reader), (images, plan))
