"""A check, at every call and within microseconds, that a model has not changed since it was inspected.

A packed forward reads weights and calls modules one by one. So it may miss something that a user has changed in a
patched model, such as a replaced block. Inspecting all modules takes milliseconds. So a model is inspected once, a
:class:`Watch` records its parts, and each call only compares them.
"""

from collections.abc import Callable
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

from torch import nn

from tinydrop_kernels.torch_internals import global_hooks, hooks_of

_is_training = itemgetter("training")


class Watch:
    """A record of a model at the time when the watch was made, to compare the model with.

    Each module's children, ``forward`` on the instance, number of attributes, mode and hooks are compared, the dtype of
    the model, and torch's global hooks. A ViT-B has 276 modules, so their dictionaries are read directly, in loops that
    run in C.

    Args:
        model: any module.
        settings: returns further attribute values of the model to compare.
    """

    def __init__(self, model: nn.Module, settings: Callable[[], Any] = lambda: None):
        modules = list(model.modules())
        self.model, self._modules = model, set(modules)
        self._settings = settings
        self._attributes = [vars(module) for module in modules]
        self._children = [module._modules for module in modules if module._modules]
        self._hooks = [*chain.from_iterable(map(hooks_of, modules))]
        self._inner_hooks = [*chain.from_iterable(map(hooks_of, modules[1:]))]
        self._tensors: list[dict[str, Any]] = [named for m in modules for named in (m._parameters, m._buffers) if named]
        self._parts, self._state, self._seen_hooks = self._read_parts(), self._read_state(), self._read_hooks()

    def same_parts(self) -> bool:
        """Return whether no module was added, removed or exchanged, no ``forward`` set, and the model not cast.

        What a trial on noise found holds as long as this is True. A cast counts, because a trial in half precision is
        coarser.
        """
        return self._parts == self._read_parts()

    def same_state(self) -> bool:
        """Return whether modes, numbers of attributes and settings are unchanged."""
        return self._state == self._read_state()

    def same_hooks(self) -> bool:
        """Return whether modules have as many hooks as at the last inspection, and the global hooks are the same."""
        return self._seen_hooks == self._read_hooks()

    def new_parts(self) -> list[str]:
        """Return the names of the modules that were added after the watch was made."""
        return [name for name, module in self.model.named_modules() if module not in self._modules]

    def note_hooks(self) -> None:
        """Record that the present hooks have been inspected."""
        self._seen_hooks = self._read_hooks()

    def has_hooks(self) -> bool:
        """Return whether any hook runs inside the model. Hooks on the model itself do not count."""
        return any(self._inner_hooks) or bool(global_hooks())

    def pointers(self) -> list[int]:
        """Return the addresses of all parameters and buffers, which a recorded CUDA graph reads from."""
        tensors = chain.from_iterable(named.values() for named in self._tensors)
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def _read_parts(self) -> tuple[Any, ...]:
        children = [*chain.from_iterable(map(dict.values, self._children))]
        weight = next(self.model.parameters(), None)
        return children, [*map(dict.get, self._attributes, repeat("forward"))], None if weight is None else weight.dtype

    def _read_state(self) -> tuple[Any, ...]:
        return [*map(len, self._attributes)], [*map(_is_training, self._attributes)], self._settings()

    def _read_hooks(self) -> tuple[Any, ...]:
        return [*map(len, self._hooks)] if any(self._hooks) else None, global_hooks()
