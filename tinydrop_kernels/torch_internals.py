"""Everything of torch that torch does not promise, and nothing else."""

from typing import Any

import torch


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
