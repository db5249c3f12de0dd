"""The timm families that can be patched, one file each; :class:`base.Family` says what a file must offer."""

from importlib import import_module

import timm
from torch import nn

from tinydrop_kernels.families.base import Family, UnsupportedModelError
from tinydrop_kernels.families.trial import find_mismatch

__all__ = ["FAMILIES", "Family", "UnsupportedModelError", "family_of", "find_mismatch"]

FAMILIES: dict[str, Family] = {}
_broken: list[str] = []  # families that cannot be imported with the installed timm, and why

# Each by itself: a timm that renames a part of one leaves the others usable.
for _name in ("Vit", "Beit", "Eva", "Swin"):
    try:
        _family: type[Family] = getattr(import_module(f"tinydrop_kernels.families.{_name.lower()}"), _name)
        FAMILIES[_name.lower()] = _family()
    except ImportError as _error:
        _broken.append(f"{_name.lower()}: {_error}")


def family_of(model: nn.Module) -> Family:
    """Return the family of a model; :meth:`Family.unsupported_reason` says whether every part of it is supported.

    Raises:
        UnsupportedModelError: none takes the model.
    """
    for family in FAMILIES.values():
        if family.accepts(model):
            return family
    supported = "; ".join(family.name for family in FAMILIES.values())
    lost = f"; not with timm {timm.__version__}: {'; '.join(_broken)}" if _broken else ""
    raise UnsupportedModelError(f"model: got {type(model).__name__}, supported: {supported}{lost}")
