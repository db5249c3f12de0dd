"""Registration of the operators as ``torch.ops.tinydrop.*``.

``Library.define`` and ``impl`` cost about 2 microseconds a call where ``custom_op`` costs 7 (docs/decisions.md).
"""

import importlib
from collections.abc import Callable

import torch

from tinydrop_kernels.ops.backend import choose_backend

LIBRARY = torch.library.Library("tinydrop", "DEF")
OPERATORS: list[str] = []


def kernel_of(name: str) -> Callable:
    """``launch`` of the operator's module in ``ops.kernels``, which is imported with Triton at the first call."""
    return importlib.import_module(f"tinydrop_kernels.ops.kernels.{name}").launch


def define(schema: str, fake: Callable, run: Callable) -> Callable:
    """Define an operator that ``run`` carries out on CPU and CUDA, and return it.

    Args:
        schema: as in ``torch.library.define``, without the namespace.
        fake: shapes and dtypes of the result, for tracing.
        run: takes the operator's arguments.
    """
    name = LIBRARY.define(schema).split("(")[0].split("::")[-1]
    OPERATORS.append(name)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"tinydrop::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.tinydrop, name).default


def register(schema: str, fake: Callable, reference: Callable) -> Callable:
    """:func:`define` an operator that has two implementations.

    Args:
        reference: plain PyTorch. ``launch`` of the operator's module in ``ops.kernels`` takes the same arguments and
            gives the same result.
    """
    name = schema.split("(")[0]

    def run(*args):
        # the kernels accumulate in float32, which is not enough for float64
        fits = args[0].dtype != torch.float64
        if fits and choose_backend(args[0].device.type)[0] == "triton":
            return kernel_of(name)(*args)
        return reference(*args)

    return define(schema, fake, run)
