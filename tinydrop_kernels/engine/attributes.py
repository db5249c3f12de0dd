"""Attributes that patching sets on instances, and what becomes of them in copies and pickles of a patched model.

A deep copy or a pickle of a patched model is patched, too. A shallow copy would share attributes that are bound to the
original, so it would answer as the original even after its own head is replaced. So calling a shallow copy raises an
error. ``copy`` and ``pickle`` call ``__reduce_ex__`` of the original and ``__setstate__`` of the copy, so patching sets
the first (:func:`reduced`), and the copy gets the second (:func:`_fill`), which finds out if the copy is shallow.
"""

from functools import partial
from typing import Any

from torch import nn

from tinydrop_kernels.ops.types import TimmModule


class InstanceAttributes(list[tuple[nn.Module, str, object]]):
    """Module, name and value of each attribute that patching sets on an instance."""

    def set(self) -> None:
        """Set all attributes."""
        for module, name, value in self:
            setattr(module, name, value)

    def remove_from(self, model: nn.Module | None = None, of: nn.Module | None = None) -> None:
        """Remove the attributes, except those that have another value by now.

        Args:
            model: a shallow copy of ``of``, to remove the attributes from. The default is each attribute's own module.
            of: the module that ``model`` is a copy of. Only this module's attributes are removed.
        """
        for module, name, value in self:
            holder = module if model is None else model
            if (of is None or module is of) and vars(holder).get(name) is value:
                delattr(holder, name)


def reduced(model: TimmModule, protocol: int) -> tuple[Any, ...]:
    """Return how to copy or pickle a patched model, as ``__reduce_ex__`` does. The copy is then made by ``_fill``."""
    kind: Any = type(model)
    _, _, state, *_ = kind.__reduce_ex__(model, max(protocol, 2))
    return _blank, (kind,), state


def _blank(kind: Any) -> TimmModule:
    model = kind.__new__(kind)
    vars(model)["__setstate__"] = partial(_fill, model)
    return model


def _fill(model: TimmModule, state: dict[str, Any]) -> None:
    kind: Any = type(model)
    kind.__setstate__(model, state)
    delattr(model, "__setstate__")
    tinydrop = model.tinydrop
    if tinydrop.model is not model:
        tinydrop.attributes.remove_from(model, of=tinydrop.model)
        model.forward = _refuse_shallow_copy


def _refuse_shallow_copy(*args: object, **kwargs: object) -> None:
    raise RuntimeError(
        "model: this is a shallow copy of a patched model, whose blocks it shares; use copy.deepcopy, or unpatch the "
        "model before it is copied"
    )
