"""Registration of the operators as ``torch.ops.tinydrop.*``.

``Library.define`` and ``impl`` cost about 2 microseconds a call where ``custom_op`` costs 7 (docs/decisions.md).
"""

import importlib
from collections.abc import Callable

import torch

from tinydrop_kernels.ops.backend import choose_backend

LIBRARY = torch.library.Library("tinydrop", "DEF")
KERNELS: dict[str, bool] = {}  # operator: whether it has a Triton kernel


def register(schema: str, fake: Callable, reference: Callable, has_kernel: bool = False) -> Callable:
    """Define an operator for CPU and CUDA and return it.

    Args:
        schema: as in ``torch.library.define``, without the namespace.
        fake: shapes and dtypes of the result, for tracing.
        reference: plain PyTorch.
        has_kernel: whether ``ops.kernels`` holds a module of the operator's name, whose ``launch`` takes the same
            arguments and gives the same result.
    """
    name = LIBRARY.define(schema).split("(")[0].split("::")[-1]
    KERNELS[name] = has_kernel

    def implementation(device_type: str) -> Callable:
        def run(*args):
            # the kernels accumulate in float32, which is not enough for float64
            fits = args[0].dtype != torch.float64
            if fits and choose_backend(device_type, has_kernel)[0] == "triton":
                return importlib.import_module(f"tinydrop_kernels.ops.kernels.{name}").launch(*args)
            return reference(*args)

        return run

    for device_type in ("cpu", "cuda"):
        LIBRARY.impl(name, implementation(device_type), device_type.upper())
    torch.library.register_fake(f"tinydrop::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tinydrop, name).default
