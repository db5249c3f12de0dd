"""What is known about a batch between one step and the next."""

from typing import NamedTuple

from torch import Tensor

from tinydrop_kernels.ops import Packed, Part, Selection
from tinydrop_kernels.ops.packing import Packing
from tinydrop_kernels.ops.types import Grid
from tinydrop_kernels.policy import DropPolicy


class PendingPlan(NamedTuple):
    """A plan that the device has computed, or is computing, and the host has not read back."""

    policy: DropPolicy
    guidance_logits: Tensor  # (batch, the guidance model's classes)
    selection: Selection
    packing: Packing
    seconds: dict[str, float]  # by stage, filled if ``TinyDrop.timed``


class BatchPlan(NamedTuple):
    """Which images of a batch exit, which grid and patches the others keep, and where their tokens are packed."""

    policy: DropPolicy
    guidance_logits: Tensor
    selection: Selection
    levels: list[Grid]  # rows and columns of the target's grid at each level, dense first
    packed: Packed
    parts: list[Part]
    seconds: dict[str, float]


class RunningBatch(NamedTuple):
    """A batch whose kept tokens have been sent through the target."""

    images: Tensor
    plan: BatchPlan
    staying: Tensor  # int64 (segments,): places in the batch of the images that did not exit
    answers: Tensor  # (segments, classes): log-probabilities if the policy mixes answers, otherwise logits
