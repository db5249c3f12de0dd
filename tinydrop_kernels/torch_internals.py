"""Everything of torch that torch does not promise, and nothing else; each with a sentence on why it is needed.

A name that this torch does not have is looked for with ``hasattr`` or ``getattr`` where it is used, never at import.
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
NOT_COMPILED = "it decides by numbers of the batch; compile without fullgraph=True, or unpatch the model"

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)

# Of torch.backends, a parent before what follows it. oneDNN's own parent is left out: in torch 2.11 to 2.14, who sets
# it sets that of all backends.
_FLOAT32_SETTINGS = ("cudnn", "cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
_one_at_a_time = threading.RLock()


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


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute float32 as float32 within, on every device; also a decorator.

    cuDNN rounds what it convolves to TF32 unless it is forbidden, which is an error of 3e-4; cuBLAS and oneDNN round
    where the user allows it. ``fp32_precision`` is torch's newest way to forbid it, and has moved before. The settings
    are the process's: other threads compute in float32 meanwhile, too, and who enters here waits for the one within.
    What followed its parent follows it again afterwards.
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
    """Return the transforms around this call, the innermost last.

    Returns:
        Of ``torch.func`` ``"grad"`` (its vjp and jacrev too), ``"jvp"`` (its jacfwd and linearize too), ``"vmap"`` and
        ``"functionalize"``; of ``torch.autograd`` ``"forward_ad"``. None of them where this torch does not say.
    """
    stack: Any = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", tuple)()
    found = [interpreter.key().name.lower() for interpreter in stack or ()]
    return ["forward_ad", *found] if in_forward_mode() else found


def in_forward_mode() -> bool:
    """Return whether tangents are computed around this call, also where ``torch.func`` has put its stack aside."""
    level: int = getattr(torch.autograd.forward_ad, "_current_level", -1)
    return level >= 0


@functools.cache
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Return whether :func:`onednn_linear` answers on this CPU, weights packed and not; a tiny product a process tells.

    The operators are meant for torch's compiler alone, so a release may rename them. On a CPU without AVX512 oneDNN has
    no bfloat16. Only an attempt reveals that: torch's own check asks the processor, and oneDNN may be told to use less.
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
    """Apply a linear layer by oneDNN where :func:`has_onednn_linear` says that it can.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)``, as it is or from :func:`onednn_prepacked`.
        bias: ``(out_features,)``.
        activation: ``"none"`` or ``"gelu"``, the exact one.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


def onednn_prepacked(weight: Tensor) -> Any:
    """Return a copy of ``(out_features, in_features)`` as oneDNN reads it, which can neither be copied nor pickled."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _exact(rows: int, dtype: torch.dtype) -> Tensor:
    """Small integers ``(rows, 16)``, whose products are exact in every dtype."""
    return (torch.arange(rows * 16) % 3).view(rows, 16).to(dtype)


def eager(function: Function) -> Function:
    """Return the function so decorated that torch.compile neither compiles it nor what it calls.

    ``torch.compiler.disable`` imports ``torch._dynamo`` (2 s). Where nothing else has done so, that waits for the first
    call, as torch itself does it.
    """
    later: Any = getattr(torch, "_disable_dynamo", None)
    if later is not None and "torch._dynamo" not in sys.modules:
        waiting: Function = later(function)
        return waiting
    disabled: Function = torch.compiler.disable(function, reason=NOT_COMPILED)
    return disabled


def eager_outside(function: Function) -> Function:
    """Return the function so decorated that torch.compile compiles what it calls, each by itself, but not it."""
    disabled: Function = torch.compiler.disable(function, recursive=False, reason=NOT_COMPILED)
    return disabled


@functools.cache
def for_any_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for any shapes and numbers, but that torch takes 1 for another than all larger ones."""
    return torch.compile(function, dynamic=True)


@functools.cache
def for_any_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model and images, compiled for any number of images of one size."""
    run = torch.compile(function)

    def marked(model: Any, images: Tensor) -> Any:
        torch._dynamo.maybe_mark_dynamic(images, 0)
        return run(model, images)

    return marked
