"""The timm families that can be patched, one file each; :class:`base.Family` says what a file must offer."""

from importlib import import_module
from typing import cast

import timm
from torch import nn

from tinydrop_kernels.families.base import Family, UnsupportedModelError, find_mismatch

__all__ = ["FAMILIES", "Family", "UnsupportedModelError", "family_of", "find_mismatch"]

FAMILIES: dict[str, Family] = {}
_broken: list[str] = []  # families that this timm has not what they need for, and what that is

# Each by itself: a timm that renames a part of one leaves the others usable.
for _name in ("vit", "beit", "eva", "swin"):
    try:
        FAMILIES[_name] = cast(Family, import_module(f"tinydrop_kernels.families.{_name}"))
    except ImportError as _error:
        _broken.append(f"{_name}: {_error}")


def family_of(model: nn.Module) -> Family:
    """The family of a model; :meth:`Family.unsupported_reason` says whether every part of it is supported.

    Raises:
        UnsupportedModelError: none takes the model.
    """
    for family in FAMILIES.values():
        if family.accepts(model):
            return family
    supported = "; ".join(family.NAME for family in FAMILIES.values())
    lost = f"; not with timm {timm.__version__}: {'; '.join(_broken)}" if _broken else ""
    raise UnsupportedModelError(f"model: got {type(model).__name__}, supported: {supported}{lost}")
