"""Noticing, at every call and within microseconds, that a model is no longer what was inspected.

A packed forward reads weights and calls modules one by one, so what somebody changes in a patched model may be passed
over. Walking all modules to look for that takes milliseconds. So a model is inspected once, a :class:`Watch` remembers
what it consisted of then, and each call only compares.
"""

from collections.abc import Callable
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

from torch import nn

from tinydrop_kernels.torch_internals import global_hooks, hooks_of

_is_training = itemgetter("training")


class Watch:
    """A model as it was when this was made.

    Compared are, of every module: children and instance forwards (its parts), number of attributes, hooks and mode; and
    the hooks on all modules. A ViT-B has 276 modules, so their dictionaries are read directly, in loops of C.

    Args:
        model: any module.
        settings: returns attribute values of the model that matter besides.
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
        """Return whether no module was added, removed or exchanged, and no ``forward`` set on an instance."""
        return self._parts == self._read_parts()

    def same_state(self) -> bool:
        """Return whether modes, numbers of attributes and settings are what they were."""
        return self._state == self._read_state()

    def same_hooks(self) -> bool:
        """Return whether the same modules have hooks as when they were looked at last."""
        return self._seen_hooks == self._read_hooks()

    def new_parts(self) -> list[str]:
        """Return the names of the modules that were not there when this was made."""
        return [name for name, module in self.model.named_modules() if module not in self._modules]

    def note_hooks(self) -> None:
        """Take the hooks that there are now for looked at."""
        self._seen_hooks = self._read_hooks()

    def has_hooks(self) -> bool:
        """Return whether hooks run within the model; those on the model itself do not count."""
        return any(self._inner_hooks) or bool(global_hooks())

    def pointers(self) -> list[int]:
        """Return where every parameter and buffer lies: what a recorded CUDA graph has baked in."""
        tensors = chain.from_iterable(named.values() for named in self._tensors)
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def _read_parts(self) -> tuple[list[Any], list[Any]]:
        children = [*chain.from_iterable(map(dict.values, self._children))]
        return children, [*map(dict.get, self._attributes, repeat("forward"))]

    def _read_state(self) -> tuple[Any, ...]:
        return [*map(len, self._attributes)], [*map(_is_training, self._attributes)], self._settings()

    def _read_hooks(self) -> tuple[Any, ...]:
        return [*map(len, self._hooks)] if any(self._hooks) else None, global_hooks()
