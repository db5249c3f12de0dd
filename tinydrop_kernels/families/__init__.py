"""The timm families that can be patched: one module each, all with the same functions.

* ``accepts(model)``, ``refusal(model)``: is it of this family, and what of it is not supported;
* ``differs(model)``: once patched, which stage does not answer as timm's does;
* ``attentions(model)``, ``attend(attention, x, attn_mask)``: which modules must know about segments, and how;
* ``check_images``, ``grid_size``, ``embed``, ``encode``, ``classify``: the model on a ragged batch, stage by stage.
"""

from types import ModuleType

from torch import nn

from tinydrop_kernels.families import vit

FAMILIES = (vit,)


class UnsupportedModelError(TypeError):
    """The model cannot be patched; the message says why and what can."""


def family_of(model: nn.Module) -> ModuleType:
    """The family module for a model.

    Raises:
        UnsupportedModelError: no family takes the model.
    """
    for family in FAMILIES:
        if family.accepts(model):
            return family
    supported = "; ".join(family.NAME for family in FAMILIES)
    raise UnsupportedModelError(f"model: got {type(model).__name__}, supported: {supported}")


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless every part of an unpatched model is supported."""
    reason = family_of(model).refusal(model)
    if reason:
        raise UnsupportedModelError(f"model: {type(model).__name__} with {reason}")
