"""The answers of two models made one, on the scale of log-probabilities."""

import math

import torch
from torch import Tensor

from tinydrop_kernels.policy.drop import DropPolicy
from tinydrop_kernels.torch_internals import eager


@eager  # compiled, every number of images that stay would be a graph of its own
def combined_answers(target: Tensor, guidance: Tensor, policy: DropPolicy) -> Tensor:
    """Return the answers for images that went through the target.

    Args:
        target, guidance: logits ``(images, classes)`` of the same images; of other classes only where they do not mix.
        policy: of which ``mixes_answers`` says whether the answers are log-probabilities, or the target's logits as
            they are.

    Returns:
        ``(images, classes)`` in the target's dtype.
    """
    return blended(target, guidance, policy.blend) if policy.mixes_answers else target


def blended(target: Tensor, guidance: Tensor, weight: float) -> Tensor:
    """Return ``log((1 - weight) softmax(target) + weight softmax(guidance))``.

    Args:
        target, guidance: logits ``(images, classes)`` of the same images.
        weight: in [0, 1). With 0 the guidance is not looked at.

    Returns:
        ``(images, classes)`` in the target's dtype, computed in float32 at least.
    """
    mixed = _log_softmax(target)
    if weight:
        mixed = torch.logaddexp(mixed + math.log1p(-weight), _log_softmax(guidance) + math.log(weight))
    return mixed.to(target.dtype)


@eager
def log_probabilities(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``log_softmax`` over the classes of logits ``(images, classes)``, computed in float32 at least."""
    return _log_softmax(logits).to(dtype)


def in_doubt(answers: Tensor, guidance: Tensor, second_look: tuple[float, float]) -> Tensor:
    """Return whether an answer from a reduced image does not stand: bool ``(images,)``.

    It stands if its confidence is above the second bar, or if it is the guidance model's too and above the first.

    Args:
        answers: log-probabilities or logits ``(images, classes)``.
        guidance: logits ``(images, classes)`` of the same images.
        second_look: see :class:`DropPolicy`.
    """
    bar_if_agreed, bar = second_look
    confidence, predicted = answers.float().softmax(dim=1).max(dim=1)
    agrees = predicted == guidance.argmax(dim=1)
    return ~((confidence > bar) | (agrees & (confidence > bar_if_agreed)))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
