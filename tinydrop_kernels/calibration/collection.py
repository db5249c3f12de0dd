"""Ask the models: guidance once at each resolution, the target once for each cell of a small table."""

import hashlib
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tinydrop_kernels.calibration.table import (
    BLENDS,
    Cell,
    Table,
    View,
    drop_cells,
    law_of,
    named_and_sure,
    whole_cells,
)
from tinydrop_kernels.engine import TinyDrop
from tinydrop_kernels.flops import count_flops
from tinydrop_kernels.guidance import Guidance, GuidanceError, Guided
from tinydrop_kernels.identity import identity_of
from tinydrop_kernels.ops import Saliency
from tinydrop_kernels.ops.types import Grid, TimmModule
from tinydrop_kernels.patching import patch, unpatch
from tinydrop_kernels.policy import CALM, DropPolicy
from tinydrop_kernels.policyfile import versions
from tinydrop_kernels.timing import timed

SIDES = (1.0, 6 / 7, 5 / 7, 4 / 7)  # of the guidance model's images: 224, 192, 160 and 128 pixels for one of 224
STRIDE = 32  # to a multiple of which they are rounded


def resolutions(guidance: Guidance) -> list[Guidance]:
    """A guidance model at its own input size and at smaller ones, as far as it can be fed them."""
    found = {guidance.input_size: guidance}
    for side in SIDES[1:]:
        height, width = (STRIDE * round(pixels * side / STRIDE) for pixels in guidance.input_size)
        size = height, width
        if min(size) < 2 * STRIDE or size in found:
            continue
        try:
            found[size] = guidance.at_size(size)
        except GuidanceError:  # a transformer of one size
            continue
    return list(found.values())


@torch.inference_mode()
def collect(
    model: TimmModule,
    guidances: Sequence[Guidance],
    loader: Iterable[Any],
    cache: Path | None = None,
    *,
    random_drop: bool = False,
    progress: bool = False,
) -> tuple[Table, str]:
    """Run everything that policies are judged by, and put the model back as it was.

    Args:
        model: the target, in eval mode and not patched.
        guidances: guidance models that know its classes.
        loader: batches of images normalised for the target, or of images and labels.
        cache: a folder that keeps what each batch was answered, so that nothing is run twice; None keeps nothing. It
            may be shared: what is kept goes by the contents of the images and the weights of the models.
        random_drop: run drops of random patches, too, for the picture.
        progress: show a bar with the time left.

    Returns:
        The answers, and a hash of the images.

    Raises:
        ValueError: no images; labels of some batches only, or out of range; a model in training mode.
        Whatever ``patch`` raises.
    """
    if model.training:
        raise ValueError("model: it is in training mode, expected one in eval mode")
    patch(model, guidances[0], DropPolicy())
    try:
        with torch.inference_mode(False):  # autograd, which some guidance models need, refuses tensors made in it
            asking = _Asking(model, guidances, cache, random_drop)
        total = len(loader) if isinstance(loader, Sized) else None
        for images, labels in tqdm(_batches(loader), total=total, unit="batch", disable=None if progress else True):
            asking.add(images, labels)
        return asking.table(), asking.contents.hexdigest()[:16]
    finally:
        unpatch(model)


class _Asking:
    """Batch by batch, from images to a table."""

    def __init__(self, model: TimmModule, guidances: Sequence[Guidance], cache: Path | None, random_drop: bool):
        self.tinydrop: TinyDrop = model.tinydrop
        self.classes, self.cache, self.random_drop = model.tinydrop.num_classes, cache, random_drop
        self.weight = next(model.parameters())
        self.views = [
            _Sized(number, sized.to(self.weight.device, self.weight.dtype), sized.input_size == guidance.input_size)
            for number, guidance in enumerate(guidances)
            for sized in resolutions(guidance)
        ]
        identity = identity_of(model, self.classes)
        self.target_key = _hash(self.weight.device, *self.tinydrop.normalization, versions(), identity)
        self.keys = [
            _hash(self.target_key, guidance.identity, guidance.input_size, guidance.mean, guidance.std)
            for _, guidance, _ in self.views
        ]
        self.contents = hashlib.sha256()
        self.levels: list[Grid] = []
        self.labels: list[NDArray[Any]] = []
        self.dense: list[NDArray[Any]] = []
        self.said: list[list[tuple[NDArray[Any], ...]]] = [[] for _ in self.views]
        self.noted: dict[Any, list[dict[str, Any]]] = {}

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """Ask about one batch."""
        digest = hashlib.sha256(np.ascontiguousarray(images.float().numpy(force=True)).data)
        self.contents.update(digest.digest())
        batch = _Batch(images.to(self.weight.device, self.weight.dtype), digest.hexdigest()[:24])
        self.tinydrop.check(batch.images)
        self._take(labels, len(images))
        levels = self.tinydrop.plan(batch.images, self._guided(0, batch)).levels
        if self.levels not in ([], levels):
            raise ValueError(f"loader: got images of the grid {levels[0]} after others, expected images of one size")
        self.levels = levels
        dense = self._once(self.target_key, batch, "dense", lambda: self._of_dense(batch))
        self.dense.append(dense["logits"].argmax(1).int().numpy(force=True))
        whole = {cell: self._of_cell(0, cell, batch) for cell in whole_cells(levels)}
        for number, view in enumerate(self.views):
            said = self._once(
                self.keys[number], batch, f"guidance {number}", partial(self._of_guidance, number, batch), "guidance"
            )
            drops = {cell: self._of_cell(number, cell, batch) for cell in self._drops(view)}
            targets = [answer["logits"] for answer in (whole | drops).values()]
            self.said[number].append(_reduced(said["logits"], targets))

    def _drops(self, view: "_Sized") -> list[Cell]:
        """What is dropped hangs on what the guidance sees: at its own size alone, or it would be run four times."""
        return drop_cells(self.levels, self.random_drop) if view.own_size else []

    def _guided(self, view: int, batch: "_Batch", saliency: Saliency = CALM) -> Guided:
        self.tinydrop.guidance, self.tinydrop.policy = self.views[view].guidance, DropPolicy(saliency=saliency)
        return self.tinydrop.guide(batch.images)

    def _of_guidance(self, view: int, batch: "_Batch") -> dict[str, Any]:
        guided, seconds = timed(lambda _: self._guided(view, batch), batch.images)
        return {"logits": guided.logits, "seconds": seconds}

    def _of_dense(self, batch: "_Batch") -> dict[str, Any]:
        logits, seconds = timed(self.tinydrop.dense, batch.images)
        return {"logits": logits, "seconds": seconds}

    def _of_cell(self, view: int, cell: Cell, batch: "_Batch") -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            guided = self._guided(view, batch, cell.saliency or CALM)
            if cell.random:
                draws = torch.Generator().manual_seed(int(batch.name[:8], 16))
                drawn = torch.rand(len(batch.images), *self.levels[cell.level], generator=draws)
                guided = Guided(guided.logits, None, drawn.to(batch.images.device))
            law = law_of(cell, self.levels)
            self.tinydrop.policy = DropPolicy(*law, blend=0, second_look=None, saliency=cell.saliency or CALM)
            plan = self.tinydrop.plan(batch.images, guided)
            logits, seconds = timed(lambda images: self.tinydrop.run(images, plan), batch.images)
            report = self.tinydrop.report()
            flops = (report.flops - report.guidance_flops) / report.images
            return {"logits": logits, "seconds": seconds, "flops": flops, "dense": report.dense_flops / report.images}

        of_target = cell.saliency is None and not cell.random
        kept = "whole" if of_target else "random" if cell.random else "-".join(map(str, cell.saliency or ()))
        key = self.target_key if of_target else self.keys[view]
        return self._once(key, batch, cell, ask, f"{cell.level}-{cell.patches}-{kept}")

    def _once(
        self, key: str, batch: "_Batch", what: Any, ask: Callable[[], dict[str, Any]], name: str = "dense"
    ) -> dict[str, Any]:
        """What was answered before, or is now; its costs are noted."""
        path = self.cache and self.cache / key / f"{batch.name}-{name}.pt"
        if path and path.is_file():
            answer: dict[str, Any] = torch.load(path, map_location=self.weight.device, weights_only=True)
        else:
            answer = ask()
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}.part")
                torch.save(answer, part)
                part.replace(path)  # so that there is all of it or nothing
        costs = {name: value for name, value in answer.items() if name != "logits"}
        self.noted.setdefault(what, []).append(costs | {"images": len(batch.images)})
        return answer

    def _take(self, labels: Tensor | None, images: int) -> None:
        if (labels is None) != (not self.labels) and self.dense:
            raise ValueError("loader: got batches with labels and batches without, expected one kind")
        if labels is None:
            return
        found = torch.as_tensor(labels).numpy(force=True)
        if found.shape != (images,) or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(f"loader: got labels {found.dtype} {found.shape}, expected whole numbers ({images},)")
        if found.min() < 0 or found.max() >= self.classes:
            raise ValueError(f"loader: got labels {found.min()} to {found.max()}, expected 0 to {self.classes - 1}")
        self.labels.append(found.astype(np.int32))

    def table(self) -> Table:
        """All batches together."""
        if not self.dense:
            raise ValueError("loader: got no images")
        seconds = {what: _seconds(noted) for what, noted in self.noted.items()}
        flops = {what: noted[0]["flops"] for what, noted in self.noted.items() if isinstance(what, Cell)}
        views = []
        for number, view in enumerate(self.views):
            predicted, confidence, answers, sure = (
                np.concatenate(parts, axis=-1) for parts in zip(*self.said[number], strict=True)
            )
            guidance = view.guidance
            views.append(
                View(
                    guidance=view.number,
                    input_size=guidance.input_size,
                    predicted=predicted,
                    confidence=confidence,
                    cells=(*whole_cells(self.levels), *self._drops(view)),
                    answers=answers,
                    sure=sure,
                    flops=count_flops(guidance.model, (guidance.in_chans, *guidance.input_size)),
                    seconds=seconds[f"guidance {number}"],
                )
            )
        return Table(
            levels=self.levels,
            blends=BLENDS,
            dense=np.concatenate(self.dense),
            labels=np.concatenate(self.labels) if self.labels else None,
            views=tuple(views),
            flops=flops,
            seconds={cell: seconds[cell] for cell in flops},
            dense_flops=self.noted[whole_cells(self.levels)[0]][0]["dense"],
            dense_seconds=seconds["dense"],
        )


class _Sized(NamedTuple):
    """A guidance model at one input size."""

    number: int  # which model
    guidance: Guidance
    own_size: bool


class _Batch(NamedTuple):
    """Images on the model's device, and a name that goes by their contents."""

    images: Tensor
    name: str


def _reduced(guidance: Tensor, targets: list[Tensor]) -> tuple[NDArray[Any], ...]:
    """From logits to what a :class:`View` holds of a batch: predicted, confidence, answers and how sure they are."""
    confidence, predicted = guidance.float().softmax(dim=1).max(dim=1)
    pairs = [[named_and_sure(target, guidance, blend) for blend in BLENDS] for target in targets]
    answers, sure = (torch.stack([torch.stack([pair[i] for pair in row]) for row in pairs]) for i in (0, 1))
    return tuple(tensor.numpy(force=True) for tensor in (predicted.int(), confidence, answers, sure))


def _batches(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in loader:
        if isinstance(batch, Tensor):
            yield batch, None
        elif isinstance(batch, list | tuple) and len(batch) >= 2 and isinstance(batch[0], Tensor):
            yield batch[0], batch[1]
        else:
            raise TypeError(f"loader: got a batch of {type(batch).__name__}, expected images, or (images, labels)")


def _seconds(noted: list[dict[str, Any]]) -> float:
    """Of an image: the median over the batches as large as the first, which alone are alike."""
    size: int = noted[0]["images"]
    spent: list[float] = [batch["seconds"] for batch in noted if batch["images"] == size]
    return statistics.median(spent) / size


def _hash(*parts: Any) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]
