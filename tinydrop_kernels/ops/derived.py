"""Values computed from weights, kept between calls for as long as the weights surely are the same.

Kept are resampled positions, bias tables, rotary angles, and weights in oneDNN's layout. A change of weights is noticed
in two ways:

* by version, address, dtype and device of the tensors: in-place operations, ``load_state_dict``, ``to``, and most
  optimizers change one of them;
* by training: torch's fused optimizers, replayed CUDA graphs and writes through ``.data`` (merged adapters, averaged
  weights) do not. So once anything in the process has trained, nothing is kept of weights that were not settled since
  then. It is computed anew at every call, which is always right. :func:`settle` says that training is over.

Writes through ``.data`` in a process that has not trained cannot be noticed. They need :func:`settle` too.
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
    """A value, and the weights that it was made of, as they were then."""

    of: list[ref[Tensor]]
    state: list[Any]
    value: Any


@dataclass
class _Kept:
    """What is kept of one weight, and of others together with it."""

    settled: int = 0  # how much training there had been when somebody said that it is over
    values: dict[Hashable, _Made] = field(default_factory=dict)


_kept = WeakTensorKeyDictionary()  # values may neither copy nor pickle, so they are kept apart from the weights
_training = 0  # how often something in this process has trained


def note_training(*_: Any) -> None:
    """Note that weights may have changed unnoticed: a step of an optimizer, or a forward in training mode."""
    global _training
    if not torch.compiler.is_compiling():  # a compiled step counts versions, and a number would be a guard of its graph
        _training += 1


register_optimizer_step_post_hook(note_training)


def settle(module: nn.Module) -> None:
    """Forget what was computed from a module's weights, and keep it again from now on.

    Args:
        module: parameters and buffers of which change no more unnoticed.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        _kept[tensor] = _Kept(_training)


def keeps(*weights: Tensor) -> bool:
    """Return whether what is computed from these weights may be kept.

    It may not while a gradient is to reach them, or while compiling; nor of weights that training may have changed, or
    that were made in inference mode, which count no versions.
    """
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if wanted or torch.compiler.is_compiling() or any(weight.is_inference() for weight in weights):
        return False
    kept = _kept.get(weights[0])
    return _training == (0 if kept is None else kept.settled)


def derived(weights: Tensor | tuple[Tensor, ...], key: Hashable, make: Callable[[], T]) -> T:
    """Return what ``make`` computes from weights alone; kept between calls while the weights are the same.

    Args:
        weights: parameters or buffers, or one.
        key: tells apart what is made of the same weights.
        make: called where nothing is kept.
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
