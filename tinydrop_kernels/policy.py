"""How sure the guidance model must be for an image to exit, and how many patches the others keep."""

import math
from dataclasses import dataclass

from torch import Tensor

from tinydrop_kernels import ops


@dataclass(frozen=True)
class DropPolicy:
    """From the guidance model's confidence ``c`` to early exit and number of kept patches.

    An image exits when ``c > tau``. Otherwise ``ceil(T * keep)`` of its ``T`` patches are kept, with
    ``keep = 1 - (c / tau) ** gamma`` clamped to ``[min_keep, 1]``: the surer the guidance, the fewer patches.

    The defaults stay within a point of the dense model where there is a background to drop (docs/accuracy.md).

    Args:
        tau: exit threshold in (0, 1], or None for no early exit (then 1 stands for tau in the law). A target without
            classes needs None.
        gamma: curvature, >= 0. Low drops aggressively, high is conservative; ``math.inf`` drops nothing, which
            together with tau is a plain cascade of the two models.
        min_keep: least fraction of patches kept, in (0, 1].
        summary: give the target one token more, the mean of the dropped patches' embeddings.

    Raises:
        ValueError: a value out of its range.

    Source: TinyDrop, arXiv 2509.03379, section 3, whose summary gives the behaviour; the formula is ours.
    """

    tau: float | None = 0.9
    gamma: float = 4.0
    min_keep: float = 0.5
    summary: bool = False

    def __post_init__(self):
        for name in ("tau", "gamma", "min_keep"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and (name != "tau" or value is not None):
                raise TypeError(f"{name}: got {value!r}, accepted is a number")
        if self.tau is not None and not 0 < self.tau <= 1:
            raise ValueError(f"tau: got {self.tau}, accepted is a number in (0, 1], or None for no early exit")
        if not self.gamma >= 0:
            raise ValueError(f"gamma: got {self.gamma}, accepted is a number >= 0 (math.inf drops nothing)")
        if not 0 < self.min_keep <= 1:
            raise ValueError(f"min_keep: got {self.min_keep}, accepted is a number in (0, 1]")

    @classmethod
    def fixed(cls, keep_ratio: float, tau: float | None = None, summary: bool = False) -> "DropPolicy":
        """Keep the same fraction of every image that does not exit: the law at ``gamma = 0``.

        Args:
            keep_ratio: fraction of patches kept, in (0, 1].
            tau, summary: as in :class:`DropPolicy`; by default nothing exits.
        """
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio: got {keep_ratio}, accepted is a number in (0, 1]")
        return cls(tau=tau, gamma=0.0, min_keep=keep_ratio, summary=summary)

    @classmethod
    def cascade(cls, tau: float) -> "DropPolicy":
        """Early exit alone, with a dense target: the rival that dropping has to beat."""
        return cls(tau=tau, gamma=math.inf)

    def keep_counts(self, confidence: Tensor, num_patches: int) -> Tensor:
        """int32 ``(batch,)``: patches kept of each image, 0 where it exits. See :func:`ops.keep_counts`."""
        return ops.keep_counts(confidence, num_patches, self.tau, self.gamma, self.min_keep)
