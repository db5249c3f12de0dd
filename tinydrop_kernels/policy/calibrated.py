"""A policy, and what is known about it: for which model, from which images, with which certainty. To and from JSON."""

import json
import math
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinydrop_kernels.ops import Saliency
from tinydrop_kernels.policy.drop import DropPolicy
from tinydrop_kernels.policy.fingerprint import Fingerprint

FORMAT = "tinydrop policy 2"
FIRST_FORMAT = "tinydrop policy 1"  # it said "model" for the target, and "centre"


class PolicyFileError(ValueError):
    """The file is no policy file, or one for another model or guidance."""


@dataclass(frozen=True)
class Certificate:
    """What is known of a policy's loss, ``str`` of which says it in words."""

    accuracy_drop: float  # the stated one
    confidence: float
    labelled: bool  # the loss is accuracy; otherwise the share of answers unlike the dense model's, which bounds it
    passed: bool
    ordered: int  # images that put the candidates into an order
    tested: int  # images that tested them
    candidates: int  # of them were tested, in that order until one failed
    lost: int  # of the images that tested the policy: the dense model is right and the policy is not, or they differ
    gained: int  # the policy is right and the dense model is not
    least_drop: float  # the smallest that so many images could certify

    def __str__(self) -> str:
        images, sure = self.ordered + self.tested, f"{self.confidence:.0%} confidence"
        drop = _points(self.accuracy_drop) if self.labelled else f"{self.accuracy_drop:.2%} of the answers"
        could = f"with {images} images the smallest drop that can be certified is {_points(self.least_drop)}"
        if not self.passed:
            needed = math.ceil(math.log(1 - self.confidence) / math.log1p(-self.accuracy_drop) * images / self.tested)
            if self.least_drop > self.accuracy_drop:
                reason = f"{could}, and this would need about {needed}"
            elif not self.candidates:
                reason = "no policy that is cheaper than the dense model seemed to keep that"
            else:
                reason = f"the first candidate failed the test on {self.tested} images ({could})"
            return f"Not certified that any policy loses at most {drop} at {sure}: {reason}."
        if self.labelled:
            claim = f"On images like these this policy loses at most {drop} of accuracy"
            seen = f"it lost {self.lost} that the dense model has right, and gained {self.gained} that it has wrong"
        else:
            claim = f"On images like these this policy changes at most {drop}, and loses no more accuracy than that"
            seen = f"it answered {self.lost} unlike the dense model"
        return (
            f"Certified: {claim}, at {sure}. Of the {self.tested} images that tested it, {seen}; {self.ordered} other "
            f"images had put the candidates into an order, of which {self.candidates} were tested. ({could[0].upper()}"
            f"{could[1:]}.)"
        )


@dataclass(frozen=True)
class UncertifiedPolicy:
    """What a plain grid search would take, of whose loss on other images nothing is known."""

    policy: DropPolicy
    input_size: tuple[int, int]
    cost: float
    loss: float  # on the images that chose it

    def __str__(self) -> str:
        return (
            f"Best without a certificate: {1 - self.cost:.1%} saved and {100 * self.loss:+.2f} points lost on the very "
            "images that chose it; on others expect more"
        )


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy with its certificate, as :func:`tinydrop_kernels.calibrate` makes it and ``patch`` takes it."""

    policy: DropPolicy
    input_size: tuple[int, int]  # of the guidance model
    cost: float  # over the dense model's, on the images that calibrated it
    cost_by: str  # "flops" or "time"
    certificate: Certificate
    uncertified: UncertifiedPolicy | None
    target: Fingerprint
    guidance: Fingerprint
    images: dict[str, Any]  # their number, and hashes of their contents and names
    versions: dict[str, str]
    date: str

    def __str__(self) -> str:
        what = "FLOPs" if self.cost_by == "flops" else "time"
        lines = [
            f"{self.policy}, guidance at {self.input_size[0]} x {self.input_size[1]}",
            f"{what} saved: {1 - self.cost:.1%}, guidance counted",
        ]
        if not self.certificate.passed:
            lines = [
                "The dense model: leave it unpatched, for patched with this file it pays for the guidance as well."
            ]
        lines.append(str(self.certificate))
        return "\n".join([*lines, *([str(self.uncertified)] if self.uncertified else [])])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy file.

        Raises:
            OSError: it cannot be written.
        """
        values = asdict(self) | {"target": self.target._asdict(), "guidance": self.guidance._asdict()}
        values["policy"] = _plain(self.policy)
        if self.uncertified:
            values["uncertified"]["policy"] = _plain(self.uncertified.policy)
        text = json.dumps({"format": FORMAT} | values | {"in_words": str(self)}, indent=2, allow_nan=False)
        Path(path).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibratedPolicy":
        """Read a policy file.

        Raises:
            PolicyFileError: it cannot be read, or is none.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version = values.pop("format")
            if version == FIRST_FORMAT:
                _rename(values)
            elif version != FORMAT:
                raise ValueError(f"expected one of the format {FORMAT!r}")
            del values["in_words"]
            rough = values.pop("uncertified")
            return cls(
                **values
                | {
                    "policy": _policy(values["policy"]),
                    "input_size": tuple(values["input_size"]),
                    "certificate": Certificate(**values["certificate"]),
                    "uncertified": rough
                    and UncertifiedPolicy(
                        _policy(rough["policy"]), tuple(rough["input_size"]), rough["cost"], rough["loss"]
                    ),
                    "target": Fingerprint(**values["target"]),
                    "guidance": Fingerprint(**values["guidance"]),
                }
            )
        except OSError as error:
            raise PolicyFileError(f"policy: {str(path)!r} cannot be read: {error.strerror or error}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PolicyFileError(f"policy: {str(path)!r} is no policy file: {error}") from None

    def check(self, target: Fingerprint, guidance: Fingerprint) -> None:
        """Refuse another model, another guidance model, or other classes than those it was calibrated with.

        Args:
            target: the target's.
            guidance: the guidance model's.

        Raises:
            PolicyFileError: one of them is another.
        """
        for argument, found, known in (("target", target, self.target), ("guidance", guidance, self.guidance)):
            if found.classes != known.classes:
                raise PolicyFileError(
                    f"policy: it was calibrated for a {argument} of {known.classes} classes, got {found.classes}"
                )
            if found.dtype != known.dtype:
                warnings.warn(
                    f"policy: it was calibrated with the {argument} in {known.dtype}, which is in {found.dtype} now; "
                    "rounding may change some answers",
                    stacklevel=3,
                )
            if found.weights != known.weights:
                same = " of the same name" if found.name == known.name else ""
                raise PolicyFileError(
                    f"policy: it was calibrated for the {argument} {known.name} (weights {known.weights}), got "
                    f"{found.name} with other weights ({found.weights}){same and '; only the name is the same'}"
                )


def _points(share: float) -> str:
    return f"{100 * share:.2f} points"


def _plain(policy: DropPolicy) -> dict[str, Any]:
    values = asdict(policy) | {"saliency": policy.saliency._asdict()}
    return values | ({"gamma": "inf"} if math.isinf(policy.gamma) else {})  # JSON knows no infinity


def _policy(values: dict[str, Any]) -> DropPolicy:
    return DropPolicy(**values | {"gamma": float(values["gamma"]), "saliency": Saliency(**values["saliency"])})


def _rename(values: dict[str, Any]) -> None:
    """Give the values of a file of the first format the names of today."""
    values["target"] = values.pop("model")
    for holder in (values, values["uncertified"]):
        if holder:
            saliency = holder["policy"]["saliency"]
            saliency["center"] = saliency.pop("centre")
