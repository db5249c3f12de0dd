"""Mistakes that mypy must find. If it misses one, ``make lint`` reports an unused ``type: ignore``."""

from torch import Tensor

from tinydrop_kernels.families import Family
from tinydrop_kernels.families.vit import Vit


def misspelt_call(family: Family, model: object, tokens: Tensor) -> object:
    return family.clasify(model, tokens)  # type: ignore[attr-defined]


def forgotten_argument(family: Family, model: object, images: Tensor, indices: Tensor) -> Tensor:
    return family.embed(model, images, indices)  # type: ignore[call-arg]


def families() -> list[Family]:
    return [Vit(), Family()]  # type: ignore[abstract]
