"""Everything of torch that torch does not promise, and nothing else; each with a sentence on why it is needed.

A name that this torch does not have is looked for with ``hasattr`` or ``getattr`` where it is used, never at import.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of a module's own hooks: forward, forward-pre, backward and backward-pre."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def global_hooks() -> list[Callable[..., Any]]:
    """Return the hooks that run at the call of every module, as ``register_module_forward_hook`` sets them.

    Those of torch's ``ModuleTracker`` are left out: they only look, and ``FlopCounterMode`` sets them.
    """
    found = chain.from_iterable(getattr(_module, name, {}).values() for name in _GLOBAL_HOOKS)
    return [hook for hook in found if not isinstance(getattr(hook, "__self__", None), ModuleTracker)]


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module runs more than its class's ``forward``.

    That is a hook of its own, or a ``forward`` on the instance that patching has not set there. Hooks on every module
    (:func:`global_hooks`) are looked for once a call, not here.
    """
    forward = vars(module).get("forward")
    return any(hooks_of(module)) or not (forward is None or is_own(forward))


def is_own(forward: object) -> bool:
    """Return whether a ``forward`` on an instance was set there by this package: a partial of one of its functions."""
    return isinstance(forward, partial) and str(getattr(forward.func, "__module__", "")).startswith("tinydrop_kernels.")
