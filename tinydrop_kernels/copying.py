"""Copies of a patched model: deep ones and pickles carry the patch along, shallow ones are refused when called.

A shallow copy shares the attributes that patching has set, which are bound to the model that was patched. Called, it
would answer as that one, even with a head of its own. ``copy`` and ``pickle`` ask the instance for ``__reduce_ex__``,
and what they make for ``__setstate__``, so a copy is looked at when it is made.
"""

from functools import partial
from typing import Any

from tinydrop_kernels.ops.types import TimmModule


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
    if tinydrop._model is not model:
        for module, name, value in tinydrop.set_attributes:
            if module is tinydrop._model and vars(model).get(name) is value:
                delattr(model, name)
        model.forward = _refuse_shallow_copy


def _refuse_shallow_copy(*args: object, **kwargs: object) -> None:
    raise RuntimeError(
        "model: this is a shallow copy of a patched model, whose blocks it shares; use copy.deepcopy, or unpatch the "
        "model before it is copied"
    )
