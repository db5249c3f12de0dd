"""How the answers of two models become one."""

from torch import Tensor


def blended(target: Tensor, guidance: Tensor, weight: float) -> Tensor:
    """``log((1 - weight) softmax(target) + weight softmax(guidance))``; ``target`` untouched where the weight is 0.

    Args:
        target, guidance: logits ``(images, classes)`` of the same images.
        weight: in [0, 1).
    """
    if not weight:
        return target
    mixed = (1 - weight) * target.float().softmax(dim=1) + weight * guidance.float().softmax(dim=1)
    return mixed.log().to(target.dtype)


def in_doubt(answers: Tensor, guidance: Tensor, second_look: tuple[float, float]) -> Tensor:
    """Whether an answer from a reduced image does not stand: bool ``(images,)``.

    It stands if its confidence is above the second bar, or if it is the guidance model's too and above the first.

    Args:
        answers, guidance: logits ``(images, classes)`` of the same images.
        second_look: see :class:`DropPolicy`.
    """
    bar_if_agreed, bar = second_look
    confidence, predicted = answers.float().softmax(dim=1).max(dim=1)
    agrees = predicted == guidance.argmax(dim=1)
    return ~((confidence > bar) | (agrees & (confidence > bar_if_agreed)))
