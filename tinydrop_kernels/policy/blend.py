"""Blending of the answers of the target and the guidance model, on the scale of log-probabilities."""

import math

import torch
from torch import Tensor

from tinydrop_kernels.policy.drop import DropPolicy
from tinydrop_kernels.torch_internals import eager


@eager  # because otherwise torch.compile would compile it again for each number of images that do not exit
def combined_answers(target: Tensor, guidance: Tensor, policy: DropPolicy) -> Tensor:
    """Return the answers for images that went through the target.

    Args:
        target, guidance: logits ``(images, classes)`` of the same images. The numbers of classes may differ if the
            policy does not mix answers.
        policy: if it mixes answers, they are log-probabilities, otherwise the target's own logits.

    Returns:
        ``(images, classes)`` in the target's dtype.
    """
    return blended(target, guidance, policy.blend) if policy.mixes_answers else target


def blended(target: Tensor, guidance: Tensor, weight: float) -> Tensor:
    """Return ``log((1 - weight) softmax(target) + weight softmax(guidance))``.

    Args:
        target, guidance: logits ``(images, classes)`` of the same images.
        weight: in [0, 1). With 0, ``guidance`` is not used.

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
    """Return whether each answer is too doubtful to stand, bool ``(images,)``.

    An answer stands if its confidence is above the second threshold. It also stands if its confidence is above the
    first threshold and both models predict the same class.

    Args:
        answers: log-probabilities or logits ``(images, classes)``.
        guidance: the guidance model's logits ``(images, classes)`` for the same images.
        second_look: the two thresholds, see :class:`DropPolicy`.
    """
    bar_if_agreed, bar = second_look
    confidence, predicted = answers.float().softmax(dim=1).max(dim=1)
    agrees = predicted == guidance.argmax(dim=1)
    return ~((confidence > bar) | (agrees & (confidence > bar_if_agreed)))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
