"""Which implementation of an operator runs: plain PyTorch, a Triton kernel or the CUDA C++ extension."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "reference", "triton", "cuda")
VARIABLE = "TINYDROP_BACKEND"
_forced: list[str] = []


def _check(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: got {name!r}, accepted are {', '.join(BACKENDS)}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within the ``with`` block: ``"reference"``, ``"triton"``, ``"cuda"`` or ``"auto"``.

    It overrides the environment variable ``TINYDROP_BACKEND``, which does the same for a whole process. ``"cuda"`` is
    the optional C++ extension, which holds attention alone: every other operator runs as with ``"auto"``. Tensors that
    the forced backend cannot take, float64 above all, run the next one that can.
    """
    _forced.append(_check(name, "backend"))
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str:
    """What is forced, ``"auto"`` if nothing is.

    Raises:
        ValueError: the environment variable holds no backend.
    """
    return _forced[-1] if _forced else _check(os.environ.get(VARIABLE, "auto"), VARIABLE)


def choose_backend(device_type: str) -> tuple[str, str]:
    """``"reference"`` or ``"triton"`` for tensors on such a device, and why.

    Raises:
        ValueError: the environment variable holds no backend.
        RuntimeError: Triton is forced where it cannot run.
    """
    forced = forced_backend()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not HAS_TRITON:
        able, reason = False, "Triton is not installed"
    elif device_type == "cuda":
        able, reason = True, "Triton kernel"
    else:
        able, reason = interpreted, "Triton in its interpreter" if interpreted else f"no Triton for {device_type}"
    if forced == "triton" and not able:
        raise RuntimeError(f"backend: triton is forced, but {reason}")
    if forced == "reference":
        return "reference", "plain PyTorch; forced"
    if able and (forced == "triton" or device_type == "cuda"):
        return "triton", reason
    return "reference", f"plain PyTorch; {reason}"


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd is recording: then the reference runs, through which gradients flow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
