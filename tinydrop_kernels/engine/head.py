"""The number of classes of a model's answer, asked of its head: ``num_classes`` stays when that is replaced by hand."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinydrop_kernels.families import UnsupportedModelError, family_of
from tinydrop_kernels.ops.types import TimmModule


def count_classes(model: TimmModule) -> int:
    """Return the number of classes of a model's own answer, 0 where its head is none (``nn.Identity``).

    A plain linear head says it by its weight. Any other is run once, in eval mode, on an image's tokens of zeros.

    Args:
        model: of a supported family.

    Raises:
        UnsupportedModelError: the family is not supported, or the head does not answer ``(batch, classes)``.
    """
    width = linear_width(model)
    return _width_on_zeros(model) if width is None else width


def linear_width(model: TimmModule) -> int | None:
    """Return :func:`count_classes` if the head is plainly linear, or none; None for any other, which would be run."""
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # of a distilled model two, averaged
    if all(type(head) is nn.Identity for head in heads):
        return 0
    widths = {len(head.weight) if type(head) is nn.Linear else None for head in heads}
    return widths.pop() if len(widths) == 1 else None


@torch.no_grad()
def _width_on_zeros(model: TimmModule) -> int:
    kind, family, weight = type(model).__name__, family_of(model), next(model.parameters())
    image = torch.empty(1, model.in_chans, *model.patch_embed.img_size, device="meta")  # of which the shape is read
    rows, columns = family.grid_size(model, image)
    tokens = weight.new_zeros(1, family.num_prefix_tokens(model) + rows * columns, model.num_features)
    try:
        with in_eval_mode(model):
            answer = family.dense_classify(model, tokens)
    except Exception as error:  # a foreign head raises whatever it meets
        raise UnsupportedModelError(f"model: {kind} with a head that fails on zeros: {error}") from error
    if not isinstance(answer, Tensor) or answer.ndim != 2:
        got = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise UnsupportedModelError(f"model: {kind} with a head that answers {got}, expected (batch, classes)")
    return answer.shape[1]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in eval mode; every module's own mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
