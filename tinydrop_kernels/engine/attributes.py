"""The attributes that patching sets on instances; copies and pickles of a patched model.

A deep copy and a pickle carry the patch along. A shallow copy shares the attributes, which are bound to the model that
was patched: it would answer as that model, even with a head of its own. So a shallow copy is refused when it is called.
``copy`` and ``pickle`` ask the instance for ``__reduce_ex__`` and its copy for ``__setstate__``, which is where a copy
is looked at.
"""

from functools import partial
from typing import Any

from torch import nn

from tinydrop_kernels.ops.types import TimmModule


class InstanceAttributes(list[tuple[nn.Module, str, object]]):
    """Module, name and value of each attribute that patching sets on an instance."""

    def set(self) -> None:
        """Set all of them."""
        for module, name, value in self:
            setattr(module, name, value)

    def remove_from(self, model: nn.Module | None = None, of: nn.Module | None = None) -> None:
        """Remove them where they are still what was set.

        Args:
            model: remove those of ``of`` from this copy of it; by default each from its own module.
            of: the module whose attributes a copy shares.
        """
        for module, name, value in self:
            holder = module if model is None else model
            if (of is None or module is of) and vars(holder).get(name) is value:
                delattr(holder, name)


def reduced(model: TimmModule, protocol: int) -> tuple[Any, ...]:
    """Stand in for a patched model's ``__reduce_ex__``."""
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
