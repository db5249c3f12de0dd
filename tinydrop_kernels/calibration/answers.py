"""A stated accuracy drop, a policy, and the truth about what is known of it."""

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
    """The cheapest policy of which these images say, with a certainty, that it loses no more than is stated.

    The guidance model is asked once at each of four resolutions and the target once at each of a dozen reductions; all
    policies are judged from that. A part of the images puts candidates into an order, and the rest tests them.

    Args:
        model: a supported timm model in eval mode, not patched; it is put back as it was.
        guidance: as for ``patch``, of the same classes.
        loader: batches ``(images, labels)``, images ``(n, channels, height, width)`` normalised as the model's
            ``pretrained_cfg`` says, and labels whole numbers ``(n,)``; or images alone: then the loss is the share of
            answers unlike the dense model's, which bounds the accuracy lost. They should be a random sample of what the
            model will see, all of it unseen in training.
        accuracy_drop: what may be lost of the dense model's accuracy, in (0, 1): 0.005 is half a point.
        confidence: that the certificate holds, in (0, 1).
        cost: what is saved, ``"flops"``, or ``"time"`` as it is measured on this device at the loader's batch size.
        cache: a folder for the answers. Interrupted, the same call goes on from where it was.
        names: what the images are called; their hash is kept in the policy file.
        progress: show a bar with the time left, where standard error is a terminal.

    Returns:
        A policy with its certificate; ``save`` it, and give it or the file to ``patch``. Where nothing can be certified
        it is the dense model, and the certificate says why.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, or whatever ``patch`` refuses.
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
    """Ask the models once, for several drops, several guidance models, or a picture of the frontier.

    Args:
        guidances: one or more guidance models; what does not hang on them is run once for all.
        random_drop: also drop patches at random, as a yardstick in the picture.
        model, loader, cache, names, progress: as for :func:`calibrate`.
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
    """What the models said of the images, of which policies can be certified."""

    table: Table
    target: Fingerprint
    guidances: list[Fingerprint]
    images: dict[str, Any]

    def certified(
        self, accuracy_drop: float, confidence: float = 0.9, *, cost: str = "flops", guidance: int = 0
    ) -> CalibratedPolicy:
        """As :func:`calibrate`, with one of the guidance models.

        Each certificate stands alone. To take the best of several, each must hold at a higher confidence:
        :meth:`compared` sees to that.
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
        """One policy for each guidance model, all of whose certificates hold together at this confidence.

        So the cheapest of them may be taken. Each is tested at ``1 - (1 - confidence) / guidance models`` (Bonferroni).
        """
        each = 1 - (1 - confidence) / len(self.guidances)
        return [self.certified(accuracy_drop, each, cost=cost, guidance=i) for i in range(len(self.guidances))]

    def of_guidance(self, number: int) -> Table:
        """The table of one guidance model."""
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
