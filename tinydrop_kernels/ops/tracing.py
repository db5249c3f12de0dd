"""What ``torch.compile`` leaves alone; typed, as torch's own decorator is not."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
REASON = "it decides by numbers of the batch; compile without fullgraph=True, or unpatch the model"


def eager(function: F) -> F:
    """Neither the function nor what it calls is compiled."""
    disabled: F = torch.compiler.disable(function, reason=REASON)
    return disabled


def eager_outside(function: F) -> F:
    """The function is not compiled, what it calls is, each by itself."""
    disabled: F = torch.compiler.disable(function, recursive=False, reason=REASON)
    return disabled
