"""The registry of operators: their definition, their implementations, and the choice of the one that runs.

An operator is a schema and a list of implementations. The first implementation that this machine has and that takes the
arguments runs. Operators are registered with ``Library.define`` and ``impl``, which cost about 2 microseconds per call
instead of the 7 of ``custom_op`` (docs/decisions.md).
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
    """One implementation of an operator."""

    name: str  # one of BACKENDS
    what: str  # description, for people
    run: Callable[..., Any]  # called with the operator's arguments
    missing_on: Callable[[str], str | None]  # from a type of device to why it cannot run there; None if it can
    takes: Callable[[Any], bool]  # from the arguments, named as in the schema, to whether it supports them


def reference(run: Callable[..., Any], what: str = "plain PyTorch") -> Implementation:
    """Return the implementation that takes all arguments on all devices; last in every operator's list."""
    return Implementation("reference", what, run, lambda device_type: None, lambda call: True)


def triton(run: Callable[..., Any], takes: Callable[[Any], bool] | None = None) -> Implementation:
    """Return a Triton implementation. By default it takes no float64, because kernels accumulate in float32."""
    return Implementation("triton", "Triton kernel", run, _no_triton, takes or _is_no_float64)


@functools.cache
def kernels(name: str) -> Any:
    """Import ``ops.kernels.<name>`` at its first launch, so that Triton is needed only where a kernel runs."""
    return importlib.import_module(f"tinydrop_kernels.ops.kernels.{name}")


def _is_no_float64(call: Any) -> bool:
    return bool(call[0].dtype != torch.float64)


def _no_triton(device_type: str) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton does not run on {device_type}"


class Operator:
    """A registered operator and its implementations, in the order in which they are tried.

    Attributes:
        name: as in ``torch.ops.tinydrop.<name>``.
        implementations: the last one is the reference, which takes all arguments.
        call: makes a named tuple of arguments, with names and defaults as in the schema.
    """

    def __init__(self, name: str, arguments: dict[str, Any], implementations: Sequence[Implementation]):
        self.name = name
        self.implementations = tuple(implementations)
        defaults = [value for value in arguments.values() if value is not _REQUIRED]
        self.call: Callable[..., Any] = namedtuple(f"{name}_arguments", arguments, defaults=defaults)  # type: ignore[misc]

    def choose(self, *arguments: Any) -> Implementation:
        """Return the first implementation that this machine has and that takes these arguments.

        Raises:
            ValueError: the environment variable ``TINYDROP_BACKEND`` names no backend.
            RuntimeError: the forced backend cannot run on the device of the first argument.
        """
        call = self.call(*arguments)
        return next(implementation for implementation in self.on(call[0].device.type) if implementation.takes(call))

    def on(self, device_type: str) -> Sequence[Implementation]:
        """Return the implementations to try on this type of device, in order. Raises as :meth:`choose`."""
        forced = forced_backend()
        # Read the environment only where it matters, because reading takes most of a microsecond.
        interpret = os.environ.get("TRITON_INTERPRET") if forced == "triton" else None
        return _preference(self, forced, device_type, interpret)

    def explain(self, device_type: str) -> tuple[str, str]:
        """Return the name of the implementation tried first on this type of device, and the reason.

        Raises as :meth:`choose`.
        """
        first = self.on(device_type)[0]
        if forced_backend() == first.name:
            return first.name, f"{first.what}; forced"
        reasons = [i.missing_on(device_type) for i in self.implementations if i.name == "triton"]
        return first.name, "; ".join((first.what, *filter(None, reasons)))

    def __call__(self, *arguments: Any) -> Any:
        if in_forward_mode():  # otherwise torch would silently use a tangent of zero
            raise RuntimeError(
                f"{self.name}: it has no forward-mode derivative; use reverse mode (torch.func.vjp, jacrev)"
            )
        call = self.call(*arguments)
        for implementation in self.on(call[0].device.type):  # as choose, without the cost of a generator
            if implementation.takes(call):
                return implementation.run(*call)


@functools.cache
def _preference(operator: Operator, forced: str, device_type: str, interpret: str | None) -> Sequence[Implementation]:
    """Return the implementations to try on this type of device, in order.

    ``interpret`` is only part of the cache key, because Triton's interpreter may be switched on after the first call.
    """
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
    # If the operator has no implementation of that name, this is the same list as for "auto".
    return named + [i for i in (there if device_type == "cuda" else operator.implementations[-1:]) if i not in named]


def define(schema: str, fake: Callable[..., Any], implementations: Sequence[Implementation]) -> Callable[..., Any]:
    """Define the operator ``tinydrop::<name>`` for every device, and return it.

    Args:
        schema: as in ``torch.library.define``, without the namespace.
        fake: returns results of the right shapes and dtypes without computing them; used for tracing.
        implementations: in the order in which they are tried. The last one is the reference, which takes all arguments.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    registered = getattr(torch.ops.tinydrop, name).default
    arguments = {a.name: a.default_value if a.has_default_value() else _REQUIRED for a in registered._schema.arguments}
    operator = Operator(name, arguments, implementations)
    OPERATORS[name] = operator
    LIBRARY.impl(name, operator, "CompositeExplicitAutograd")  # on every device, below autograd
    torch.library.register_fake(f"tinydrop::{name}", fake, lib=LIBRARY)
    return cast(Callable[..., Any], registered)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within the ``with`` block, in this thread or task.

    The block overrides the environment variable ``TINYDROP_BACKEND``, which forces a backend for the whole process and
    is read at the first call. An operator without an implementation of that name runs as with ``"auto"``. So do
    arguments that the forced implementation does not take, such as float64.

    Args:
        name: one of ``"auto"``, ``"reference"``, ``"triton"``, ``"cuda"`` (the optional C++ extension) and ``"torch"``.
            Only attention has the last two.

    Raises:
        ValueError: ``name`` is no backend.

    Example:
        >>> with ops.use_backend("reference"):
        ...     print(ops.OPERATORS["segment_pool"].on("cuda")[0].what)
        plain PyTorch
    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str:
    """Return the name of the forced backend, ``"auto"`` if none is forced.

    Raises:
        ValueError: the environment variable ``TINYDROP_BACKEND`` names no backend.
    """
    return _forced.get() or _forced_by_environment()


@functools.cache  # reading the environment takes most of a microsecond, in every layer
def _forced_by_environment() -> str:
    return _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records an operation on these tensors. If so, the reference runs, which has gradients."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
