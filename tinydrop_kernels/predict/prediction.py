"""One row per image: the patched model's answer, and the patches that were used for it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tinydrop_kernels.report import Call


class Candidate(NamedTuple):
    """A class that the image may belong to.

    Attributes:
        label: class index.
        name: class name.
        probability: the class's softmax probability, or its sigmoid score if the model is multi-label.
    """

    label: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """A patched model's answer for one image, and the patches that were used for it.

    ``top`` holds probabilities, never logits. If the image exited, they are the guidance model's. Otherwise they are
    the target's, blended with the guidance model's if the policy has a blend.

    Attributes:
        index: position among the inputs.
        name: the path, or ``"#index"`` for an image without a path.
        exited: True if the guidance model alone answered.
        confidence: the guidance model's confidence.
        kept: number of patches that went through the target, 0 if the image exited.
        patches: number of patches of the dense image.
        grid: rows and columns of the patch grid that the target used.
        second_look: True if the image also went through the dense target.
        top: the most probable classes, most probable first.
        guidance: the guidance model's top class; None if its classes are not the target's.
        dense: the dense model's top class; None if the dense model was not run.

    Example:
        >>> row = tdk.Predictor(tdk.patch(model, guidance), top=3).classify(images).rows[0]
        >>> row.name, row.patches, len(row.top)
        ('#0', 196, 3)
        >>> row.exited, row.kept > 0  # random weights are never confident
        (False, True)
    """

    index: int
    name: str
    exited: bool
    confidence: float
    kept: int
    patches: int
    grid: tuple[int, int]
    second_look: bool
    top: tuple[Candidate, ...]
    guidance: Candidate | None = None
    dense: Candidate | None = None

    @property
    def disagreed(self) -> bool:
        """True if the top class differs from the guidance model's or the dense model's, as far as these are known."""
        return any(other is not None and other.label != self.top[0].label for other in (self.guidance, self.dense))

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON.

        Probabilities and confidences are rounded to four digits, and are None if they are not finite. docs/rows.md
        describes the fields.

        Example:
            >>> row = tdk.Predictor(tdk.patch(model, guidance)).classify(images).rows[0].as_dict()
            >>> row["path"], row["exit"], row["of"]
            ('#0', False, 196)
            >>> sorted(row["top"][0])
            ['class', 'name', 'probability']
        """
        row = {
            "path": as_text(self.name),
            "exit": self.exited,
            "confidence": _rounded(self.confidence),
            "kept": self.kept,
            "of": self.patches,
            "grid": list(self.grid),
            "second_look": self.second_look,
            "top": [_candidate_as_dict(candidate) for candidate in self.top],
        }
        others = {"guidance": self.guidance, "dense": self.dense}
        return row | {name: _candidate_as_dict(candidate) for name, candidate in others.items() if candidate}


def unreadable_row(name: str, reason: str) -> dict[str, Any]:
    """Return the row of an image that could not be read, as plain values for JSON."""
    return {"path": as_text(name), "error": as_text(reason)}


def as_text(name: str) -> str:
    r"""Return a file name as valid Unicode. A byte that is not UTF-8 becomes an escape, such as ``\udce9``."""
    return name.encode("utf-8", "backslashreplace").decode()


class PredictedBatch(NamedTuple):
    """A classified batch: the images, the record of the model's call, and one row per image."""

    images: Tensor  # (batch, channels, height, width), on the model's device and in its dtype
    call: Call
    rows: list[Prediction]


def predictions(
    indices: list[int],
    names: list[str],
    call: Call,
    candidates: list[tuple[Candidate, ...]],
    guidance: Sequence[Candidate | None],
    dense: Sequence[Candidate | None],
) -> Iterator[Prediction]:
    """Yield the rows of a batch. Each list has one entry per image."""
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
            guidance=guidance[i],
            dense=dense[i],
        )


def _rounded(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _candidate_as_dict(candidate: Candidate) -> dict[str, Any]:
    return {"class": candidate.label, "name": candidate.name, "probability": _rounded(candidate.probability)}
