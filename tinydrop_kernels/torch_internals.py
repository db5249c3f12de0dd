"""Everything of torch that torch does not promise, and nothing else: each behind ``hasattr``, with a sentence why."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Of torch.backends, a parent before what follows it. oneDNN's own parent is left out: in torch 2.11 to 2.14, who sets
# it sets that of all backends.
_FLOAT32_SETTINGS = ("cudnn", "cudnn.conv", "cuda.matmul", "mkldnn.conv", "mkldnn.matmul")
_one_at_a_time = threading.RLock()


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
