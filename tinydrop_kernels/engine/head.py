"""The number of classes of a model, read from its head, because ``num_classes`` is stale after a head is replaced."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinydrop_kernels.families import UnsupportedModelError, family_of
from tinydrop_kernels.ops.types import TimmModule


def count_classes(model: TimmModule) -> int:
    """Return the number of classes of a model; 0 if its head is ``nn.Identity``.

    The number is read from the weight of a linear head. Any other head is run once, in eval mode, on tokens of zeros.

    Args:
        model: a model of a supported family.

    Raises:
        UnsupportedModelError: the family is not supported, or the head's output is not ``(batch, classes)``.
    """
    width = linear_width(model)
    return _width_on_zeros(model) if width is None else width


def linear_width(model: TimmModule) -> int | None:
    """Return the number of classes if the head is ``nn.Linear`` or ``nn.Identity``; None if it would have to be run."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # a distilled model averages two heads
    if all(type(head) is nn.Identity for head in heads):
        return 0
    widths = {len(head.weight) if type(head) is nn.Linear else None for head in heads}
    return widths.pop() if len(widths) == 1 else None


@torch.no_grad()
def _width_on_zeros(model: TimmModule) -> int:
    kind, family, weight = type(model).__name__, family_of(model), next(model.parameters())
    image = torch.empty(1, model.in_chans, *model.patch_embed.img_size, device="meta")  # only its shape is read
    rows, columns = family.grid_size(model, image)
    tokens = weight.new_zeros(1, family.num_prefix_tokens(model) + rows * columns, model.num_features)
    try:
        with in_eval_mode(model):
            answer = family.dense_classify(model, tokens)
    except Exception as error:  # a user's own head may raise any error
        raise UnsupportedModelError(f"model: {kind} with a head that fails on zeros: {error}") from error
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        got = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise UnsupportedModelError(f"model: {kind} with a head that answers {got}, expected (batch, classes)")
    return answer.shape[1]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode within the context. Afterwards every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
