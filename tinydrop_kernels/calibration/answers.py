"""The public calibration functions: run the models on images once, then choose and certify policies."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tinydrop_kernels.calibration.bounds import counts_of
from tinydrop_kernels.calibration.certify import certify, uncertified_best
from tinydrop_kernels.calibration.collection import collect
from tinydrop_kernels.calibration.provenance import today, versions
from tinydrop_kernels.calibration.sweep import judge
from tinydrop_kernels.calibration.table import Table
from tinydrop_kernels.checkpoints import load_model
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.guidance.model import Guidance
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.policy.calibrated import CalibratedPolicy, Certificate, UncertifiedPolicy
from tinydrop_kernels.policy.drop import DropPolicy
from tinydrop_kernels.policy.fingerprint import Fingerprint, fingerprint_of

__all__ = ["Answers", "calibrate", "gather"]

DENSE_POLICY = DropPolicy(tau=None, gamma=float("inf"), min_keep=1.0, coarsen=1.0, blend=0.0, second_look=None)
COSTS = ("flops", "time")


def calibrate(
    model: TimmModule,
    guidance: str | nn.Module | Guidance,
    loader: Iterable[Any],
    accuracy_drop: float = 0.005,
    confidence: float = 0.9,
    *,
    cost: str = "flops",
    cache: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> CalibratedPolicy:
    """Return the cheapest policy that is certified to lose at most ``accuracy_drop`` on images like these.

    Each model runs only once per setting: the guidance model at up to four input sizes, the target at about a dozen
    reductions. All policies are judged from these answers. Some of the images (20 %) order the candidate policies. The
    other images test the candidates.

    Args:
        model: a supported timm model in eval mode, not patched. It is restored afterwards.
        guidance: the guidance model, as for ``patch``. It must have the same classes as ``model``.
        loader: batches ``(images, labels)``, or batches of images alone. Images are ``(n, channels, height, width)``,
            normalised as the model's ``pretrained_cfg`` says. Labels are integers ``(n,)``. Without labels, the loss is
            the share of answers that differ from the dense model's, which is an upper bound on the accuracy lost. The
            images should be a random sample of those the model will see, and none of them used in training.
        accuracy_drop: how much of the dense model's accuracy may be lost, in (0, 1). 0.005 is half a percentage point.
        confidence: the probability with which the certificate holds, in (0, 1).
        cost: what to save, ``"flops"`` or ``"time"``. Time is measured on this device at the loader's batch size.
        cache: a folder that keeps the models' answers. After an interruption, the same call continues from there.
        names: names of the images. Their hash is written to the policy file.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        A policy with its certificate. Call ``save`` to write a policy file. ``patch`` takes the policy or the file. If
        no policy can be certified, the result is the dense model, and the certificate gives the reason.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or ``patch`` refuses the models.

    Example:
        >>> policy = tdk.calibrate(model, guidance, [images], accuracy_drop=0.01, progress=False)
        >>> policy.certificate.passed  # two images are too few to certify anything
        False
        >>> policy.policy.min_keep  # so the policy is the dense model
        1.0
    """
    _check(accuracy_drop, confidence, cost)
    answers = gather(model, [guidance], loader, cache=cache, names=names, progress=progress)
    return answers.certified(accuracy_drop, confidence, cost=cost)


def gather(
    model: TimmModule,
    guidances: Sequence[str | nn.Module | Guidance],
    loader: Iterable[Any],
    *,
    cache: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    random_drop: bool = False,
    progress: bool = True,
) -> "Answers":
    """Run the models on the images once and return their answers, from which any number of policies can be certified.

    Use this function in place of :func:`calibrate` to try several accuracy drops or to compare guidance models.

    Args:
        guidances: one or more guidance models. Runs that do not depend on the guidance model are shared.
        random_drop: also run the target on randomly chosen patches, as a baseline for the frontier's picture.
        model, loader, cache, names, progress: as for :func:`calibrate`.

    Returns:
        The answers. :meth:`Answers.certified` turns them into a policy.

    Raises:
        TypeError, ValueError: as for :func:`calibrate`. ``guidances`` is empty, or ``names`` has the wrong length.

    Example:
        >>> answers = tdk.calibration.gather(model, [guidance], [images], progress=False)
        >>> policies = [answers.certified(accuracy_drop) for accuracy_drop in (0.005, 0.01)]
        >>> [policy.certificate.tested for policy in policies]
        [2, 2]
    """
    made = [_guidance(guidance) for guidance in guidances]
    if not made:
        raise ValueError("guidances: got none, expected one or more")
    folder = None if cache is None else Path(cache)
    table, contents = collect(model, made, loader, folder, random_drop=random_drop, progress=progress)
    if names is not None and len(names) != len(table):
        raise ValueError(f"names: got {len(names)} for {len(table)} images")
    images: dict[str, Any] = {"count": len(table), "labelled": table.labels is not None, "contents": contents}
    if names is not None:
        images["names"] = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
    return Answers(
        table, fingerprint_of(model, count_classes(model)), [guidance.fingerprint for guidance in made], images
    )


@dataclass(frozen=True)
class Answers:
    """The models' answers on the calibration images, as :func:`gather` returns them.

    Attributes:
        table: the answers of all models, image by image.
        target: fingerprint of the target's weights.
        guidances: fingerprints of the guidance models' weights, in the order given to :func:`gather`.
        images: the number of images, whether they have labels, and hashes of their contents and names.

    Example:
        >>> answers = tdk.calibration.gather(model, [guidance], [images], progress=False)
        >>> answers.images["count"], answers.images["labelled"]
        (2, False)
    """

    table: Table
    target: Fingerprint
    guidances: list[Fingerprint]
    images: dict[str, Any]

    def certified(
        self, accuracy_drop: float, confidence: float = 0.9, *, cost: str = "flops", guidance: int = 0
    ) -> CalibratedPolicy:
        """Return what :func:`calibrate` returns for one of the guidance models.

        Each certificate holds by itself at ``confidence``. To pick the best of several guidance models, call
        :meth:`compared`, because picking among several certificates makes a wrong one more likely.

        Args:
            accuracy_drop, confidence, cost: as for :func:`calibrate`.
            guidance: the guidance model's place in the list given to :func:`gather`.

        Raises:
            ValueError: ``accuracy_drop``, ``confidence`` or ``cost`` is out of range.

        Example:
            >>> answers = tdk.calibration.gather(model, [guidance], [images], progress=False)
            >>> policy = answers.certified(accuracy_drop=0.01)
            >>> round(policy.certificate.least_drop, 2)  # two images can certify no drop below 68 percentage points
            0.68
        """
        _check(accuracy_drop, confidence, cost)
        table = self.of_guidance(guidance)
        tested = certify(table, accuracy_drop, confidence, cost)
        lost, gained, _ = counts_of(tested.losses)
        certificate = Certificate(
            accuracy_drop=accuracy_drop,
            confidence=confidence,
            labelled=table.labels is not None,
            passed=tested.chosen is not None,
            ordered=tested.ordered,
            tested=len(table) - tested.ordered,
            candidates=tested.tried,
            lost=lost,
            gained=gained,
            least_drop=tested.least_drop,
        )
        policy, size, spent = DENSE_POLICY, table.views[0].input_size, 1.0 + table.costs(0, cost)[1]
        if tested.chosen is not None:
            policy, size = tested.chosen.policy, table.views[tested.chosen.view].input_size
            spent = judge(table, *tested.chosen, cost).cost
        best, rough = uncertified_best(table, accuracy_drop, cost), None
        if best is not None:
            judged = judge(table, *best, cost)
            rough = UncertifiedPolicy(
                best.policy, table.views[best.view].input_size, judged.cost, float(judged.losses.mean())
            )
        return CalibratedPolicy(
            policy=policy,
            input_size=size,
            cost=spent,
            cost_by=cost,
            certificate=certificate,
            uncertified=rough,
            target=self.target,
            guidance=self.guidances[guidance],
            images=self.images,
            versions=versions(),
            date=today(),
        )

    def compared(self, accuracy_drop: float, confidence: float = 0.9, *, cost: str = "flops") -> list[CalibratedPolicy]:
        """Return one policy per guidance model, with certificates that hold all at once at ``confidence``.

        The caller may therefore pick the cheapest policy. Each policy is tested at the stricter confidence
        ``1 - (1 - confidence) / number of guidance models`` (Bonferroni).

        Args:
            accuracy_drop, confidence, cost: as for :func:`calibrate`.

        Raises:
            ValueError: ``accuracy_drop``, ``confidence`` or ``cost`` is out of range.

        Example:
            >>> other = timm.create_model("test_resnet", num_classes=10).eval()
            >>> answers = tdk.calibration.gather(model, [guidance, other], [images], progress=False)
            >>> policies = answers.compared(accuracy_drop=0.01, confidence=0.9)
            >>> [round(policy.certificate.confidence, 2) for policy in policies]
            [0.95, 0.95]
        """
        each = 1 - (1 - confidence) / len(self.guidances)
        return [self.certified(accuracy_drop, each, cost=cost, guidance=i) for i in range(len(self.guidances))]

    def of_guidance(self, number: int) -> Table:
        """Return the answers with one guidance model only.

        Args:
            number: the guidance model's place in the list given to :func:`gather`.

        Example:
            >>> answers = tdk.calibration.gather(model, [guidance], [images], progress=False)
            >>> len(answers.of_guidance(0))  # images
            2
        """
        return replace(self.table, views=tuple(view for view in self.table.views if view.guidance == number))


def _guidance(guidance: str | nn.Module | Guidance) -> Guidance:
    if isinstance(guidance, str):
        guidance = load_model(guidance, "guidance")
    elif not isinstance(guidance, nn.Module):
        raise TypeError(f"guidance: got {type(guidance).__name__}, expected a timm name, a model or a Guidance")
    return guidance if isinstance(guidance, Guidance) else Guidance(guidance)


def _check(accuracy_drop: float, confidence: float, cost: str) -> None:
    for name, value in (("accuracy_drop", accuracy_drop), ("confidence", confidence)):
        if not isinstance(value, int | float | np.floating) or not 0 < value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1)")
    if cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}, expected 'flops' or 'time'")
