"""Calibrated policies: a drop policy, the models and images it was calibrated with, and its certificate, as JSON."""

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
FIRST_FORMAT = "tinydrop policy 1"  # with "model" in place of "target", and "centre" in place of "center"


class PolicyFileError(ValueError):
    """Raised if a file is not a policy file, or was made for another model or guidance model.

    Example:
        >>> try:
        ...     tdk.patch(model, guidance, "no_such_file.json")
        ... except tdk.PolicyFileError as error:
        ...     print(error)
        policy: 'no_such_file.json' cannot be read: No such file or directory
    """


@dataclass(frozen=True)
class Certificate:
    """The result of testing a policy's loss of accuracy. ``str`` of it says the result in words.

    The loss is measured in accuracy if the images have labels. Otherwise it is the share of answers that differ from
    the dense model's, which is an upper bound of the loss of accuracy.
    """

    accuracy_drop: float  # upper bound of the loss that the user asked for
    confidence: float  # confidence level of the certificate
    labelled: bool  # the images had labels
    passed: bool  # the loss was certified to be at most accuracy_drop
    ordered: int  # number of images that ranked the candidates
    tested: int  # number of images that the candidates were tested on
    candidates: int  # number of candidates that were tested, in the order of their rank until one failed
    lost: int  # tested images where only the dense model is right; without labels, where the two answers differ
    gained: int  # tested images where only the policy is right
    least_drop: float  # smallest drop that this number of images can certify

    def __str__(self) -> str:
        images, sure = self.ordered + self.tested, f"{self.confidence:.0%} confidence"
        drop = _points(self.accuracy_drop) if self.labelled else f"{self.accuracy_drop:.2%} of the answers"
        could = f"with {images} images the smallest drop that can be certified is {_points(self.least_drop)}"
        if not self.passed:
            needed = math.ceil(math.log(1 - self.confidence) / math.log1p(-self.accuracy_drop) * images / self.tested)
            if self.least_drop > self.accuracy_drop:
                reason = f"{could}, and this would need about {needed}"
            elif not self.candidates:
                reason = "every policy that is cheaper than the dense model seemed to lose more"
            else:
                reason = f"the first candidate failed the test on {self.tested} images ({could})"
            return f"Not certified that any policy loses at most {drop} at {sure}: {reason}."
        if self.labelled:
            claim = f"On images like these this policy loses at most {drop} of accuracy"
            seen = f"{self.lost} are right only with the dense model, and {self.gained} only with this policy"
        else:
            claim = f"On images like these this policy changes at most {drop}, and loses no more accuracy than that"
            seen = f"{self.lost} were answered unlike the dense model"
        return (
            f"Certified: {claim}, at {sure}. Of the {self.tested} images that it was tested on, {seen}. {self.ordered} "
            f"other images ranked the candidates, and {self.candidates} were tested in that order. ({could[0].upper()}"
            f"{could[1:]}.)"
        )


@dataclass(frozen=True)
class UncertifiedPolicy:
    """The best policy of a plain grid search. Nothing is known about its loss on other images."""

    policy: DropPolicy
    input_size: tuple[int, int]
    cost: float
    loss: float  # on the images that it was chosen with

    def __str__(self) -> str:
        return (
            f"Best without a certificate: {1 - self.cost:.1%} saved and {100 * self.loss:+.2f} points lost on the "
            "images that it was chosen with; expect a larger loss on other images"
        )


@dataclass(frozen=True)
class CalibratedPolicy:
    """A policy with its certificate. :func:`tinydrop_kernels.calibrate` returns it, and ``patch`` takes it.

    Example:
        >>> batches = [(images, torch.tensor([0, 1]))]
        >>> calibrated = tdk.calibrate(model, guidance, batches, accuracy_drop=0.02)  # doctest: +SKIP
        >>> print(calibrated)  # doctest: +SKIP
        >>> calibrated.save("policy.json")  # doctest: +SKIP
        >>> model = tdk.patch(model, guidance, "policy.json")  # doctest: +SKIP
    """

    policy: DropPolicy
    input_size: tuple[int, int]  # height and width of the guidance model's images
    cost: float  # cost of the policy over the dense model's, on the images it was calibrated with
    cost_by: str  # unit of the cost, "flops" or "time"
    certificate: Certificate
    uncertified: UncertifiedPolicy | None
    target: Fingerprint
    guidance: Fingerprint
    images: dict[str, Any]  # number of the images, and hashes of their contents and names
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
                "The dense model. Leave it unpatched, because with this file it pays for the guidance model as well."
            ]
        lines.append(str(self.certificate))
        return "\n".join([*lines, *([str(self.uncertified)] if self.uncertified else [])])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a JSON file.

        Raises:
            OSError: the file cannot be written.
        """
        values = asdict(self) | {"target": self.target._asdict(), "guidance": self.guidance._asdict()}
        values["policy"] = plain_values(self.policy)
        if self.uncertified:
            values["uncertified"]["policy"] = plain_values(self.uncertified.policy)
        text = json.dumps({"format": FORMAT} | values | {"in_words": str(self)}, indent=2, allow_nan=False)
        Path(path).write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibratedPolicy":
        """Read a policy file.

        Raises:
            PolicyFileError: the file cannot be read, or is not a policy file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version = values.pop("format")
            if version == FIRST_FORMAT:
                _rename(values)
            elif version != FORMAT:
                raise ValueError(f"expected the format {FORMAT!r}")
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
        """Check that two models are those that the policy was calibrated with. Warn if only a dtype differs.

        Args:
            target: fingerprint of the target.
            guidance: fingerprint of the guidance model.

        Raises:
            PolicyFileError: a model has other weights or another number of classes.
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


def plain_values(policy: DropPolicy) -> dict[str, Any]:
    """Return a policy as plain values for JSON."""
    values = asdict(policy) | {"saliency": policy.saliency._asdict()}
    return values | ({"gamma": "inf"} if math.isinf(policy.gamma) else {})  # because JSON has no infinity


def _policy(values: dict[str, Any]) -> DropPolicy:
    return DropPolicy(**values | {"gamma": float(values["gamma"]), "saliency": Saliency(**values["saliency"])})


def _rename(values: dict[str, Any]) -> None:
    """Rename the values of a file in the first format to the current names."""
    values["target"] = values.pop("model")
    for holder in (values, values["uncertified"]):
        if holder:
            saliency = holder["policy"]["saliency"]
            saliency["center"] = saliency.pop("centre")
