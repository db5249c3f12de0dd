"""Mistakes that mypy must see: were one to pass, ``make lint`` would complain of an ignore that is not needed."""

from torch import Tensor

from tinydrop_kernels import answers
from tinydrop_kernels.families import Family, beit, eva, vit


def misspelt_call(family: Family, model: object, tokens: Tensor) -> object:
    return family.clasify(model, tokens)  # type: ignore[attr-defined]


def forgotten_argument(family: Family, model: object, images: Tensor, indices: Tensor) -> Tensor:
    return family.embed(model, images, indices)  # type: ignore[call-arg]


def modules() -> list[Family]:
    no_family: Family = answers  # type: ignore[assignment]
    return [vit, beit, eva, no_family]
