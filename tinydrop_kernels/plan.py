"""What is known of a batch on its way through a patched model, from one step to the next."""

from typing import NamedTuple

from torch import Tensor

from tinydrop_kernels.ops import Packed, Part, Selection
from tinydrop_kernels.ops.packing import Packing
from tinydrop_kernels.ops.types import Grid
from tinydrop_kernels.policy import DropPolicy


class Asked(NamedTuple):
    """The guidance model has seen the images, and the device knows what is to be done; the host does not yet."""

    policy: DropPolicy
    guidance_logits: Tensor  # (batch, the guidance model's classes)
    selection: Selection
    packing: Packing
    seconds: dict[str, float]  # by stage, filled when ``TinyDrop.timed``


class Plan(NamedTuple):
    """What is to be done with a batch: who exits, which grid and which patches the others have, and where they lie."""

    policy: DropPolicy
    guidance_logits: Tensor
    selection: Selection
    levels: list[Grid]  # rows and columns of the target's grid at each level, dense first
    packed: Packed
    parts: list[Part]
    seconds: dict[str, float]


class Running(NamedTuple):
    """The device is at work on the answers of the images that did not exit."""

    images: Tensor
    plan: Plan
    staying: Tensor  # (segments,): their places in the batch
    answers: Tensor  # (segments, classes): log-probabilities where the policy mixes answers, else logits
