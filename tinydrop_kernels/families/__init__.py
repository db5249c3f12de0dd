"""The timm model families that can be patched.

Each family is a module of its own with a subclass of :class:`base.Family`, the interface of a family.
"""

from importlib import import_module

import timm
from torch import nn

from tinydrop_kernels.families.base import Family, UnsupportedModelError
from tinydrop_kernels.families.trial import find_mismatch

__all__ = ["FAMILIES", "Family", "UnsupportedModelError", "family_of", "find_mismatch"]

FAMILIES: dict[str, Family] = {}
_broken: list[str] = []  # each family that cannot be imported with the installed timm, and the error

# Import each family separately, so that a class that timm has renamed disables only its own family.
for _name in ("Vit", "Beit", "Eva", "Swin"):
    try:
        _family: type[Family] = getattr(import_module(f"tinydrop_kernels.families.{_name.lower()}"), _name)
        FAMILIES[_name.lower()] = _family()
    except ImportError as _error:
        _broken.append(f"{_name.lower()}: {_error}")


def family_of(model: nn.Module) -> Family:
    """Return the family of a model.

    The family may still refuse a part of the model, which :meth:`Family.unsupported_reason` reports.

    Args:
        model: any module.

    Raises:
        UnsupportedModelError: No family accepts the model.

    Example:
        >>> from tinydrop_kernels.families import family_of
        >>> type(family_of(model)).__name__
        'Vit'
    """
    for family in FAMILIES.values():
        if family.accepts(model):
            return family
    supported = "; ".join(family.name for family in FAMILIES.values())
    lost = f"; cannot be imported with timm {timm.__version__}: {'; '.join(_broken)}" if _broken else ""
    raise UnsupportedModelError(f"model: got {type(model).__name__}, supported: {supported}{lost}")
