"""How sure the guidance model must be for an image to exit, and how much of the others the target sees."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tinydrop_kernels.ops import Law, Saliency

CALM = Saliency(classes=5, norm=1.0, center=1.0)
UNMIXED: dict[str, Any] = {"tau": None, "blend": 0.0, "second_look": None}  # arguments that mix no answers


@dataclass(frozen=True)
class DropPolicy:
    """From the guidance model's confidence ``c`` to early exit, grid, number of patches and answer.

    An image exits when ``c > tau``. Of the others ``budget = 1 - (c / tau) ** gamma`` of the dense patches are spent,
    clamped to ``[min_keep, 1]``: the surer the guidance, the fewer. A coarser grid takes the share ``coarsen`` of that
    cut and dropping the rest (:func:`ops.apply_law`).

    The defaults are for a target that nobody calibrated: resolution alone, never below two fifths of the patches, a
    blend and a second look (docs/accuracy.md tells how they were chosen).

    With a policy that can exit, blend or look twice, every row of an answer is log-probabilities: the softmax and the
    argmax of logits, on one scale. With any other policy the answer is the target's own logits, untouched. A head of
    sigmoids needs one of the latter (``patch(multi_label=True)``).

    Args:
        tau: exit threshold in (0, 1], or None for no early exit (the budget is taken with tau = 1 then). Exits, a blend
            and a second look need a guidance model of the target's classes.
        gamma: curvature, >= 0. Low spends little, high much; ``math.inf`` spends everything, which together with tau is
            a plain cascade of the two models.
        min_keep: least fraction of the dense patches spent, in (0, 1].
        coarsen: the share of the cut that a coarser grid takes, in [0, 1]. 0 drops alone, as the paper does; 1 is
            resolution alone.
        blend: weight in [0, 1) of the guidance model's probabilities in the answer for an image that does not exit.
        second_look: ``(t1, t2)`` in [0, 1], or None. An answer from a reduced image stands if its confidence is above
            t2, or if it is the guidance model's own and above t1; the other images go through the target dense.
        saliency: what makes a patch salient.

    Raises:
        TypeError, ValueError: a value of another type or out of its range.

    Source: TinyDrop, arXiv 2509.03379, section 3, whose summary gives the behaviour of exit and budget; formulas ours.
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
        """Spend the same fraction of the patches on every image that does not exit: the law at ``gamma = 0``.

        Args:
            keep_ratio: fraction of the dense patches, in (0, 1].
            tau, coarsen, blend: as in :class:`DropPolicy`; by default nothing exits, and patches are dropped alone.
        """
        if not _is_number(keep_ratio) or not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio: got {keep_ratio!r}, expected a number in (0, 1]")
        return cls(tau, gamma=0.0, min_keep=keep_ratio, coarsen=coarsen, blend=blend, second_look=None)

    @classmethod
    def cascade(cls, tau: float) -> "DropPolicy":
        """Early exit alone, with a dense target: the rival that every reduction has to beat."""
        return cls(tau, gamma=math.inf, blend=0.0, second_look=None)

    @property
    def law(self) -> Law:
        """As the operators take it."""
        return Law(self.tau, self.gamma, self.min_keep, self.coarsen)

    @property
    def mixes_answers(self) -> bool:
        """True of a policy that can exit, blend or look twice: both models must know the same classes then."""
        return self.tau is not None or self.blend > 0 or self.second_look is not None


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
