"""The results of each step of :mod:`tinydrop_kernels.engine.steps`, which the next step reads."""

from typing import NamedTuple

from torch import Tensor

from tinydrop_kernels.ops import Packed, Part, Selection
from tinydrop_kernels.ops.packing import Packing
from tinydrop_kernels.ops.types import Grid
from tinydrop_kernels.policy import DropPolicy


class PendingPlan(NamedTuple):
    """A plan whose sizes the host has not read back. On a GPU the device may still be computing it."""

    policy: DropPolicy
    guidance_logits: Tensor  # (batch, the guidance model's classes)
    selection: Selection
    packing: Packing
    seconds: dict[str, float]  # by stage, filled if ``TinyDrop.timed``


class BatchPlan(NamedTuple):
    """The plan for a batch: which images exit, the grid and patches of each other image, and the packed layout."""

    policy: DropPolicy
    guidance_logits: Tensor
    selection: Selection
    levels: list[Grid]  # rows and columns of the target's grid at each level, dense first
    packed: Packed
    parts: list[Part]
    seconds: dict[str, float]


class RunningBatch(NamedTuple):
    """A batch whose kept tokens have gone through the target. On a GPU the device may still be at work on them."""

    images: Tensor
    plan: BatchPlan
    staying: Tensor  # int64 (segments,): indices in the batch of the images that did not exit
    answers: Tensor  # (segments, classes): log-probabilities if the policy mixes answers, otherwise logits
