"""How an operator is defined, which implementations it has, and which of them runs.

An operator is a schema and a list of implementations; the first that this machine has and that takes the arguments
runs. ``Library.define`` and ``impl`` cost about 2 microseconds a call where ``custom_op`` costs 7 (docs/decisions.md).
"""

import functools
import importlib
import importlib.util
import os
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tinydrop_kernels.torch_internals import in_forward_mode

HAS_TRITON = importlib.util.find_spec("triton") is not None
HALF = (torch.float16, torch.bfloat16)
BACKENDS = ("auto", "reference", "triton", "cuda", "torch")
VARIABLE = "TINYDROP_BACKEND"
LIBRARY = torch.library.Library("tinydrop", "DEF")
OPERATORS: dict[str, "Operator"] = {}
_forced: ContextVar[str | None] = ContextVar("tinydrop_backend", default=None)
_REQUIRED = object()


class Implementation(NamedTuple):
    """One way to carry out an operator."""

    name: str  # one of BACKENDS
    what: str  # for people
    run: Callable[..., Any]  # takes the operator's arguments
    missing_on: Callable[[str], str | None]  # why this machine has none for a type of device, or None
    takes: Callable[[Any], bool]  # of the arguments, by their names in the schema, whether it can


def reference(run: Callable[..., Any], what: str = "plain PyTorch") -> Implementation:
    """The implementation that takes everything, last in every operator's list."""
    return Implementation("reference", what, run, lambda device_type: None, lambda call: True)


def triton(run: Callable[..., Any], takes: Callable[[Any], bool] | None = None) -> Implementation:
    """A Triton kernel. It accumulates in float32, so that it does not take float64."""
    return Implementation("triton", "Triton kernel", run, _no_triton, takes or _is_no_float64)


@functools.cache
def kernels(name: str) -> Any:
    """The module ``ops.kernels.<name>``, imported at its first launch: Triton is needed where a kernel runs, only."""
    return importlib.import_module(f"tinydrop_kernels.ops.kernels.{name}")


def _is_no_float64(call: Any) -> bool:
    return bool(call[0].dtype != torch.float64)


def _no_triton(device_type: str) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"no Triton for {device_type}"


class Operator:
    """A registered operator and its implementations, in the order in which they are tried.

    Attributes:
        name: ``torch.ops.tinydrop.<name>``.
        implementations: the last of them, the reference, takes everything.
        call: builds the arguments as a named tuple, names and defaults as in the schema.
    """

    def __init__(self, name: str, arguments: dict[str, Any], implementations: Sequence[Implementation]):
        self.name = name
        self.implementations = tuple(implementations)
        defaults = [value for value in arguments.values() if value is not _REQUIRED]
        self.call: Callable[..., Any] = namedtuple(f"{name}_arguments", arguments, defaults=defaults)  # type: ignore[misc]

    def choose(self, *arguments: Any) -> Implementation:
        """The first implementation that this machine has and that takes these arguments.

        Raises:
            ValueError: the environment variable names no backend.
            RuntimeError: the forced backend cannot run for tensors on their device.
        """
        call = self.call(*arguments)
        return next(implementation for implementation in self.on(call[0].device.type) if implementation.takes(call))

    def on(self, device_type: str) -> Sequence[Implementation]:
        """What can run for tensors on such a device, in the order in which it is tried. Raises as :meth:`choose`."""
        forced = forced_backend()
        # Reading the environment takes most of a microsecond, so only where it matters.
        interpret = os.environ.get("TRITON_INTERPRET") if forced == "triton" else None
        return _preference(self, forced, device_type, interpret)

    def explain(self, device_type: str) -> tuple[str, str]:
        """The name of what runs for tensors on such a device if it takes them, and why. Raises as :meth:`choose`."""
        first = self.on(device_type)[0]
        if forced_backend() == first.name:
            return first.name, f"{first.what}; forced"
        reasons = [i.missing_on(device_type) for i in self.implementations if i.name == "triton"]
        return first.name, "; ".join((first.what, *filter(None, reasons)))

    def __call__(self, *arguments: Any) -> Any:
        if in_forward_mode():  # torch would take a tangent of zero for it
            raise RuntimeError(
                f"{self.name}: it has no forward-mode derivative; use reverse mode (torch.func.vjp, jacrev)"
            )
        call = self.call(*arguments)
        for implementation in self.on(call[0].device.type):  # as choose, without a generator's time
            if implementation.takes(call):
                return implementation.run(*call)


@functools.cache
def _preference(operator: Operator, forced: str, device_type: str, interpret: str | None) -> Sequence[Implementation]:
    """``interpret`` is there for the cache: Triton's interpreter may be switched on after the first call."""
    there = [i for i in operator.implementations if i.missing_on(device_type) is None]
    if forced == "auto":
        return there if device_type == "cuda" else operator.implementations[-1:]
    if forced == "reference":
        return operator.implementations[-1:]
    named = [i for i in operator.implementations if i.name == forced]
    for implementation in named:
        reason = implementation.missing_on(device_type)
        if reason is not None:
            raise RuntimeError(f"backend: {forced} is forced, but {reason}")
    # An operator without an implementation of that name runs as with "auto".
    return named + [i for i in (there if device_type == "cuda" else operator.implementations[-1:]) if i not in named]


def define(schema: str, fake: Callable[..., Any], implementations: Sequence[Implementation]) -> Callable[..., Any]:
    """Define ``tinydrop::name`` for every device, and return it.

    Args:
        schema: as in ``torch.library.define``, without the namespace.
        fake: shapes and dtypes of the result, for tracing.
        implementations: in the order in which they are tried; the last, the reference, takes everything.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    registered = getattr(torch.ops.tinydrop, name).default
    arguments = {a.name: a.default_value if a.has_default_value() else _REQUIRED for a in registered._schema.arguments}
    operator = Operator(name, arguments, implementations)
    OPERATORS[name] = operator
    LIBRARY.impl(name, operator, "CompositeExplicitAutograd")  # on every device, beneath autograd
    torch.library.register_fake(f"tinydrop::{name}", fake, lib=LIBRARY)
    return cast(Callable[..., Any], registered)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within the ``with`` block, in this thread or task: one of :data:`BACKENDS`.

    It overrides the environment variable ``TINYDROP_BACKEND``, which does the same for a whole process and is read at
    the first call. Operators that have no implementation of that name (only attention has ``"cuda"``, the optional C++
    extension, and ``"torch"``) run as with ``"auto"``, and so do arguments that the forced one cannot take, float64
    above all.

    Raises:
        ValueError: ``name`` is no backend.
    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str:
    """What is forced, ``"auto"`` if nothing is.

    Raises:
        ValueError: the environment variable names no backend.
    """
    return _forced.get() or _forced_by_environment()


@functools.cache  # looking takes most of a microsecond, in every layer
def _forced_by_environment() -> str:
    return _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is recording: then the reference runs, through which gradients flow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
