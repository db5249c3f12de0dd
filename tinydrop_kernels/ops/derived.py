"""A cache of values that are computed from weights, valid only while the weights are certain to be unchanged.

The cache holds resampled positions, bias tables, rotary angles, and prepacked weights (in oneDNN's layout). It detects
changed weights in two ways:

* by the version, address, dtype and device of the tensors. In-place operations, ``load_state_dict``, ``to`` and most
  optimizers change one of these.
* by training. torch's fused optimizers, replayed CUDA graphs and writes through ``.data`` (merged adapters, averaged
  weights) change none of these. So once anything in the process has trained, nothing is cached for weights until
  :func:`settle` is called for them. Until then their values are recomputed at every call, which is always right.

Writes through ``.data`` in a process that has not trained cannot be detected. They need :func:`settle` too.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class _Made(NamedTuple):
    """A cached value, with the weights that it was computed from and their state at that time."""

    of: list[ref[Tensor]]
    state: list[Any]
    value: Any


@dataclass
class _Kept:
    """The cached values whose first weight is the same."""

    settled: int = 0  # value of _training when settle was last called
    values: dict[Hashable, _Made] = field(default_factory=dict)


# Kept apart from the weights, because some values can neither be copied nor pickled.
_kept = WeakTensorKeyDictionary()
_training = 0  # how often something in this process has trained


def note_training(*_: Any) -> None:
    """Record an optimizer step or a forward in training mode, after which weights may have changed undetected."""
    global _training
    if not torch.compiler.is_compiling():  # a compiled step changes versions, and torch would guard on _training
        _training += 1


register_optimizer_step_post_hook(note_training)


def settle(module: nn.Module) -> None:
    """Forget what was computed from a module's weights, and cache such values again from now on.

    Args:
        module: a module whose parameters and buffers no longer change in ways that cannot be detected.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        _kept[tensor] = _Kept(_training)


def forget(module: nn.Module) -> None:
    """Forget what was computed from a module's weights. This does not say that training is over.

    Args:
        module: a module in which another module was exchanged, through which values were computed.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        kept = _kept.get(tensor)
        if kept is not None:
            kept.values.clear()


def keeps(*weights: Tensor) -> bool:
    """Return whether values computed from these weights may be cached.

    They may not while a gradient must reach the weights, while compiling, or after training that no :func:`settle` has
    followed. Nor may they for weights made in inference mode, because such tensors have no version.
    """
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if wanted or torch.compiler.is_compiling() or any(weight.is_inference() for weight in weights):
        return False
    kept = _kept.get(weights[0])
    return _training == (0 if kept is None else kept.settled)


def derived(weights: Tensor | tuple[Tensor, ...], key: Hashable, make: Callable[[], T]) -> T:
    """Return the result of ``make``, cached between calls while the weights are the same.

    Args:
        weights: a parameter or buffer, or several.
        key: distinguishes values that are computed from the same weights.
        make: computes the value from the weights alone; called if no valid value is cached.
    """
    weights = (weights,) if isinstance(weights, Tensor) else weights
    if not keeps(*weights):
        return make()
    kept = _kept.get(weights[0])
    if kept is None:
        kept = _kept[weights[0]] = _Kept()
    made: _Made | None = kept.values.get(key)
    state = [(weight._version, weight.data_ptr(), weight.dtype, weight.device) for weight in weights]
    if made is None or made.state != state or any(was() is not now for was, now in zip(made.of, weights, strict=True)):
        with torch.inference_mode(False), torch.no_grad():
            made = kept.values[key] = _Made([ref(weight) for weight in weights], state, make())
    value: T = made.value
    return value
