"""Kernel launches that skip Triton's binding of arguments, which costs the host more than the rest of a launch.

Triton's ``kernel[grid](...)`` examines at every call what each argument specialises the kernel on. The callers here
know which calls share a compiled kernel. So the first call goes through Triton, which compiles the kernel and returns
it. Later calls run the compiled kernel as ``compiled[grid](*arguments)`` does in Triton's fused-softmax tutorial. They
do not read Triton's knobs and hooks, so a knob or hook that is set after the first launch has no effect.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# List a release only after checking its launcher, because a launcher with other parameters would misread the arguments.
# AMD's launcher is left out, because it specialises on more.
IS_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "8"], ["3", "9"]) and torch.version.hip is None
# Fuse multiplications and additions explicitly. The default warns in Triton 3.9 and will be off in 3.10.
FUSED = {"enable_fp_fusion": True}
_compiled: dict[Hashable, CompiledKernel] = {}


class Launcher:
    """A kernel on a device: ``launcher(grid, arguments)`` does ``kernel[grid](*arguments, **options)``.

    Args:
        kernel: made by ``triton.jit``.
        device: the device of the arguments.
        same: a key that, with kernel and device, determines the compiled kernel. It must hold types, constants, options
            and the value of each specialised argument. It stands for calls in which all tensors that are specialised on
            their alignment begin at a multiple of 16 bytes.
        options: compiler options.
    """

    def __init__(self, kernel: Any, device: torch.device, same: Hashable, options: dict[str, Any]):
        self.kernel, self.device, self.options = kernel, device, FUSED | options
        self.place = (kernel, device, same)
        self.compiled = _compiled.get(self.place)
        # Triton launches on the current device. With a single GPU this is always the tensors' device.
        self.is_alone = device.type != "cuda" or torch.cuda.device_count() == 1

    def __call__(self, grid: tuple[int, int, int], arguments: tuple[Any, ...], are_aligned: bool = True) -> None:
        """Launch the kernel.

        Args:
            grid: number of programs along each axis.
            arguments: all of the kernel's arguments in its order, including constants.
            are_aligned: whether the tensors are aligned as ``same`` assumes.
        """
        if self.is_alone:
            self._launch(grid, arguments, are_aligned)
        else:
            with torch.cuda.device(self.device):
                self._launch(grid, arguments, are_aligned)

    def _launch(self, grid: tuple[int, int, int], arguments: tuple[Any, ...], are_aligned: bool) -> None:
        compiled = self.compiled
        if are_aligned and compiled is not None:  # the usual case
            gpu = driver.active
            stream = gpu.get_current_stream(gpu.get_current_device())
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)  # None in the interpreter
        if are_aligned and IS_KNOWN and isinstance(compiled, CompiledKernel):
            self.compiled = _compiled[self.place] = compiled


@dataclass(frozen=True)
class LaunchPlan:
    """The part of a launch that calls with arguments of the same kind share. It is made once and cached."""

    launcher: Launcher
    numbers: tuple[Any, ...]  # the kernel's last arguments: strides, sizes and constants
    grid: tuple[int, int, int] = (0, 0, 0)  # number of programs, if it is the same for all such calls
    tile: tuple[int, int] = (0, 0)  # rows and columns of a program, if the grid differs from call to call


def aligned(*tensors: Tensor | None) -> bool:
    """Return whether all tensors begin at a multiple of 16 bytes, on which Triton specialises pointers."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % 16 == 0
