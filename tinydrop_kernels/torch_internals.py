"""The only module that uses private or unstable parts of torch. Each function says why it needs them.

A part that some torch releases lack is looked up with ``hasattr`` or ``getattr`` when it is used, never at import.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.utils.module_tracker import ModuleTracker

Function = TypeVar("Function", bound=Callable[..., Any])
NOT_COMPILED = "it depends on numbers of each batch; compile without fullgraph=True, or unpatch the model"

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)

# Settings of torch.backends. A parent precedes its children, because setting a parent also sets children that inherit.
# "mkldnn" itself is missing, because in torch 2.11 to 2.14 setting it sets all backends.
_FLOAT32_SETTINGS = ("cudnn", "cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
_one_at_a_time = threading.RLock()


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the dictionaries of a module's own hooks: forward, forward-pre, backward and backward-pre."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def global_hooks() -> list[Callable[..., Any]]:
    """Return the hooks that run on every module's call, as set by ``register_module_forward_hook``.

    Hooks of torch's ``ModuleTracker`` are left out. ``FlopCounterMode`` sets them, and they change nothing.
    """
    found = chain.from_iterable(getattr(_module, name, {}).values() for name in _GLOBAL_HOOKS)
    return [hook for hook in found if not isinstance(getattr(hook, "__self__", None), ModuleTracker)]


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling a module runs more than its class's ``forward``.

    True if the module has hooks of its own, or a ``forward`` set on the instance by anything but patching. Hooks on
    every module (:func:`global_hooks`) are not counted, because they are checked once per call.
    """
    forward = vars(module).get("forward")
    return any(hooks_of(module)) or not (forward is None or is_own(forward))


def is_own(forward: object) -> bool:
    """Return whether a ``forward`` set on an instance is a partial of one of this package's functions."""
    return isinstance(forward, partial) and str(getattr(forward.func, "__module__", "")).startswith("tinydrop_kernels.")


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 in full precision within the context, on every device. It is a decorator too.

    By default cuDNN rounds the inputs of convolutions to TF32, an error of 3e-4. cuBLAS and oneDNN round if the user
    allows it. ``fp32_precision`` is torch's newest switch for this, and its place has changed between releases.

    The settings hold for the whole process. So other threads also compute in full precision meanwhile, and a second
    thread that enters waits for the first to leave. Afterwards every setting is restored, and a setting that inherited
    its parent's value inherits it again.
    """
    with _one_at_a_time:
        changed: list[tuple[Any, str]] = []
        try:
            for setting in _float32_settings():
                before = setting.fp32_precision
                if before != "ieee":
                    setting.fp32_precision = "ieee"
                    changed.append((setting, before))
            yield
        finally:
            for setting, before in reversed(changed):
                setting.fp32_precision = before


def _float32_settings() -> list[Any]:
    settings: list[Any] = [torch.backends]
    for name in _FLOAT32_SETTINGS:
        setting: Any = torch.backends
        for part in name.split("."):
            setting = getattr(setting, part, None)
        settings.append(setting)
    return [setting for setting in settings if hasattr(setting, "fp32_precision")]


def transforms() -> list[str]:
    """Return the names of the torch transforms that this call runs under, the innermost last.

    Returns:
        From ``torch.func``: ``"grad"`` (also for vjp and jacrev), ``"jvp"`` (also for jacfwd and linearize), ``"vmap"``
        and ``"functionalize"``. From ``torch.autograd``: ``"forward_ad"``. A torch without this information adds none.
    """
    stack: Any = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", tuple)()
    found = [interpreter.key().name.lower() for interpreter in stack or ()]
    return ["forward_ad", *found] if in_forward_mode() else found


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is on, even while ``torch.func`` hides its stack of transforms."""
    level: int = getattr(torch.autograd.forward_ad, "_current_level", -1)
    return level >= 0


@functools.cache
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Return whether :func:`onednn_linear` works on this CPU, with plain and with prepacked weights.

    A tiny product is tried once per process and dtype. The operators are private to torch's compiler, so a release may
    rename them. On a CPU without AVX512, oneDNN has no bfloat16. torch's own check only asks the processor, and misses
    environment variables that limit oneDNN to fewer instructions.
    """
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    x, weight = _exact(3, dtype), _exact(8, dtype)
    try:
        answers = [onednn_linear(x, laid_out, None) for laid_out in (weight, onednn_prepacked(weight))]
    except RuntimeError:
        return False
    return all(torch.equal(answer, F.linear(x, weight)) for answer in answers)


def onednn_linear(x: Tensor, weight: Any, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Apply a linear layer by oneDNN. Call it only if :func:`has_onednn_linear` returns True.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``, plain or from :func:`onednn_prepacked`.
        bias: ``(out_features,)``.
        activation: ``"none"`` or ``"gelu"`` (the exact one, not the tanh approximation).
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


def onednn_prepacked(weight: Tensor) -> Any:
    """Return a copy of a weight ``(out_features, in_features)`` in oneDNN's layout. It cannot be copied or pickled."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _exact(rows: int, dtype: torch.dtype) -> Tensor:
    """Return small integers ``(rows, 16)``, whose products are exact in every dtype."""
    return (torch.arange(rows * 16) % 3).view(rows, 16).to(dtype)


def eager(function: Function) -> Function:
    """Decorate a function so that ``torch.compile`` compiles neither the function nor what it calls.

    ``torch.compiler.disable`` imports ``torch._dynamo``, which takes 2 s. If nothing else has imported it yet, the
    import is put off to the first call, by the same private decorator that torch uses.
    """
    later: Any = getattr(torch, "_disable_dynamo", None)
    if later is not None and "torch._dynamo" not in sys.modules:
        waiting: Function = later(function)
        return waiting
    disabled: Function = torch.compiler.disable(function, reason=NOT_COMPILED)
    return disabled


def eager_outside(function: Function) -> Function:
    """Decorate a function so that ``torch.compile`` skips it and compiles each function that it calls by itself."""
    disabled: Function = torch.compiler.disable(function, recursive=False, reason=NOT_COMPILED)
    return disabled


@functools.cache
def for_any_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with dynamic shapes. torch specialises size 1, so up to two variants are compiled."""
    return torch.compile(function, dynamic=True)


@functools.cache
def for_any_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of a model and images for any number of images of one size."""
    run = torch.compile(function)

    def marked(model: Any, images: Tensor) -> Any:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return run(model, images)

    return marked
