"""What a patched model said of an image, and what it looked at to say so."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tinydrop_kernels.report import Call


class Candidate(NamedTuple):
    """A class that the image may be of."""

    label: int  # its number
    name: str
    probability: float  # of a softmax over the answer; of a multi-label model the class's own sigmoid


@dataclass(frozen=True)
class Prediction:
    """The answer of a patched model for one image, and what it looked at.

    ``top`` is the model's answer as probabilities, never logits: the guidance model's where ``exited``, else the
    target's, blended where the policy blends. A patched model answers log-probabilities or, where its policy mixes
    nothing, the target's logits; in the row both are on one scale.
    """

    index: int  # place among the inputs
    name: str  # the path; "#index" for an image that came without one
    exited: bool  # answered by the guidance model alone
    confidence: float  # the guidance model's
    kept: int  # patches that went through the target; 0 if the image exited
    patches: int  # of the dense image
    grid: tuple[int, int]  # rows and columns of which the patches were kept
    second_look: bool  # went through the dense model after all
    top: tuple[Candidate, ...]  # most probable first
    guidance: Candidate | None = None  # the guidance model's first; None if its classes are not the target's
    dense: Candidate | None = None  # the dense model's first, if it was asked

    @property
    def disagreed(self) -> bool:
        """Whether the first class is not the guidance model's, or not the dense model's if that was asked."""
        return any(other is not None and other.label != self.top[0].label for other in (self.guidance, self.dense))

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
        others = {"guidance": self.guidance, "dense": self.dense}
        return row | {name: _candidate_as_dict(candidate) for name, candidate in others.items() if candidate}


class PredictedBatch(NamedTuple):
    """A batch that went through: what went in, what happened to it, and a row for each of its images."""

    images: Tensor  # (batch, channels, height, width), as the model took them
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
    """The rows of a batch; every list has an entry for each of its images."""
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
