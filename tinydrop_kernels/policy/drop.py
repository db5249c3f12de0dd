"""Drop policies: how sure the guidance model must be for an image to exit, and how many patches other images keep."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tinydrop_kernels.ops import Law, Saliency

CALM = Saliency(classes=5, norm=1.0, center=1.0)
UNMIXED: dict[str, Any] = {"tau": None, "blend": 0.0, "second_look": None}  # the arguments of a policy without mixing


@dataclass(frozen=True)
class DropPolicy:
    """A rule that takes the guidance model's confidence ``c`` to exit, grid, number of patches and answer of an image.

    An image exits if ``c > tau``. Any other image gets ``budget = 1 - (c / tau) ** gamma``, a fraction of the dense
    patches that is clamped to ``[min_keep, 1]``. The surer the guidance model is, the smaller the budget. Patches are
    saved by resizing the image to a coarser grid, by dropping patches, or by both (:func:`ops.apply_law`).

    The defaults are meant for a target without calibration. They use coarser grids alone, keep at least 40 % of the
    patches, blend answers and take a second look. docs/accuracy.md says how they were chosen.

    A policy mixes answers if it can exit, blend or take a second look. Then every answer is log-probabilities, with
    softmax and argmax as for logits. Otherwise every answer is the target's own logits. A policy that mixes answers
    needs a guidance model with the target's classes, and does not suit a head of sigmoids.

    Args:
        tau: exit threshold in (0, 1]. None turns exits off; the budget is then computed with ``tau = 1``.
        gamma: exponent of the budget, >= 0. A lower value keeps fewer patches. ``math.inf`` keeps all patches of images
            that do not exit, which makes a plain cascade of the two models.
        min_keep: lower bound of the budget, in (0, 1].
        coarsen: how much of the saving comes from a coarser grid, in [0, 1]. 0 only drops patches, as in the paper.
            1 only makes grids coarser.
        blend: weight of the guidance model's probabilities in the answer for an image that does not exit, in [0, 1).
        second_look: thresholds ``(t1, t2)`` in [0, 1], or None for no second look. An image that kept fewer than all
            patches goes through the target again, dense, unless the confidence of its answer is above t2. If the answer
            agrees with the guidance model's, above t1 is enough.
        saliency: how the patches to keep are ranked.

    Raises:
        TypeError, ValueError: an argument has another type or is out of its range.

    Example:
        >>> policy = tdk.DropPolicy(tau=0.8, min_keep=0.25)
        >>> model = tdk.patch(model, guidance, policy)
        >>> model.tinydrop.policy is policy
        True

    Source: TinyDrop, arXiv 2509.03379, section 3, for how exit and budget behave. The formulas are ours.
    """

    tau: float | None = 0.9
    gamma: float = 2.0
    min_keep: float = 0.4
    coarsen: float = 1.0
    blend: float = 0.2
    second_look: tuple[float, float] | None = (0.2, 0.7)
    saliency: Saliency = CALM

    def __post_init__(self) -> None:
        if self.tau is not None:
            self._check("tau", 0 < self._number("tau") <= 1, "a number in (0, 1], or None for no early exit")
        self._check("gamma", self._number("gamma") >= 0, "a number >= 0 (math.inf spends everything)")
        self._check("min_keep", 0 < self._number("min_keep") <= 1, "a number in (0, 1]")
        self._check("coarsen", 0 <= self._number("coarsen") <= 1, "a number in [0, 1]")
        self._check("blend", 0 <= self._number("blend") < 1, "a number in [0, 1)")
        if self.second_look is not None:
            pair = self.second_look
            expected = "a pair of numbers in [0, 1], or None"
            self._check("second_look", isinstance(pair, (tuple, list)) and len(pair) == 2, expected)
            self._check("second_look", all(_is_number(t) and 0 <= t <= 1 for t in pair), expected)
            object.__setattr__(self, "second_look", (float(pair[0]), float(pair[1])))
        if not isinstance(self.saliency, Saliency):
            raise TypeError(f"saliency: got {self.saliency!r}, expected an ops.Saliency")
        classes, *weights = self.saliency
        valid = isinstance(classes, int) and classes >= 1 and all(_is_number(w) and 0 <= w < math.inf for w in weights)
        self._check("saliency", valid, "classes >= 1 and weights >= 0")

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if not _is_number(value):
            raise TypeError(f"{name}: got {value!r}, expected a number")
        object.__setattr__(self, name, float(value))
        return float(value)

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def fixed(
        cls, keep_ratio: float, tau: float | None = None, coarsen: float = 0.0, blend: float = 0.0
    ) -> "DropPolicy":
        """Return a policy that keeps the same fraction of the patches of every image that does not exit.

        Args:
            keep_ratio: fraction of the dense patches, in (0, 1].
            tau, coarsen, blend: as in :class:`DropPolicy`. By default no image exits, and patches are only dropped.

        Example:
            >>> policy = tdk.DropPolicy.fixed(0.25)
            >>> policy.min_keep, policy.tau, policy.mixes_answers
            (0.25, None, False)
        """
        if not _is_number(keep_ratio) or not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio: got {keep_ratio!r}, expected a number in (0, 1]")
        return cls(tau, gamma=0.0, min_keep=keep_ratio, coarsen=coarsen, blend=blend, second_look=None)

    @classmethod
    def cascade(cls, tau: float) -> "DropPolicy":
        """Return a policy with exits alone, where every other image goes through the target dense.

        Compare other policies with this baseline, to see whether dropping patches saves more than exits do.

        Args:
            tau: exit threshold in (0, 1].

        Example:
            >>> model = tdk.patch(model, guidance, tdk.DropPolicy.cascade(tau=1.0))
            >>> answers = model(images)
            >>> model.tinydrop.last.counts.tolist()
            [196, 196]
        """
        return cls(tau, gamma=math.inf, blend=0.0, second_look=None)

    @property
    def law(self) -> Law:
        """The part of the policy that the operators take."""
        return Law(self.tau, self.gamma, self.min_keep, self.coarsen)

    @property
    def mixes_answers(self) -> bool:
        """True if the policy can exit, blend or take a second look. Both models must then have the same classes."""
        return self.tau is not None or self.blend > 0 or self.second_look is not None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
