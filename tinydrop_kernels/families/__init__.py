"""The timm families that can be patched, one file each; :class:`base.Family` says what a file must offer."""

from torch import nn

from tinydrop_kernels.families import beit, eva, vit
from tinydrop_kernels.families.base import Family, UnsupportedModelError, find_mismatch

__all__ = ["FAMILIES", "Family", "UnsupportedModelError", "family_of", "find_mismatch"]

FAMILIES: tuple[Family, ...] = (vit, beit, eva)


def family_of(model: nn.Module) -> Family:
    """The family of a model; :meth:`Family.unsupported_reason` says whether every part of it is supported.

    Raises:
        UnsupportedModelError: none takes the model.
    """
    for family in FAMILIES:
        if family.accepts(model):
            return family
    supported = "; ".join(family.NAME for family in FAMILIES)
    raise UnsupportedModelError(f"model: got {type(model).__name__}, supported: {supported}")
