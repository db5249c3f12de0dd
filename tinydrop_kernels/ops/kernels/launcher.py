"""Launching a kernel without binding its arguments anew, which costs the host more than all the rest of a launch.

Triton's ``kernel[grid](...)`` finds out at every call what each argument would specialise a kernel on. Whoever launches
knows: what is the same for two calls is the same binary. So the first call goes Triton's way, which compiles and
returns the binary; later ones do with it what ``compiled[grid](*arguments)`` of Triton's fused-softmax tutorial does,
but for looking at knobs and hooks: what is set there after the first launch bears on nothing.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

# A release whose launcher wants other arguments would read the wrong ones: each is looked at before it is listed here.
# AMD's specialises on more.
IS_KNOWN = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "8"], ["3", "9"]) and torch.version.hip is None
# Multiply and add in one: what is left to Triton's default warns in 3.9, and will be off in 3.10.
FUSED = {"enable_fp_fusion": True}
_compiled: dict[Hashable, CompiledKernel] = {}


class Launcher:
    """``launcher(grid, arguments)`` is ``kernel[grid](*arguments, **options)`` on the arguments' device.

    Args:
        kernel: made by ``triton.jit``.
        device: of the arguments.
        same: with kernel and device, determines what is compiled: types, constants, options, and of each argument that
            is specialised the value; tensors that are specialised on their alignment begin at a multiple of 16 bytes.
        options: of the compiler.
    """

    def __init__(self, kernel: Any, device: torch.device, same: Hashable, options: dict[str, Any]):
        self.kernel, self.device, self.options = kernel, device, FUSED | options
        self.place = (kernel, device, same)
        self.compiled = _compiled.get(self.place)
        # Triton launches on the current device, which is the tensors' where there is no other.
        self.is_alone = device.type != "cuda" or torch.cuda.device_count() == 1

    def __call__(self, grid: tuple[int, int, int], arguments: tuple[Any, ...], are_aligned: bool = True) -> None:
        """All of the kernel's arguments, constants too, in its order; ``are_aligned`` as ``same`` says."""
        if self.is_alone:
            self._launch(grid, arguments, are_aligned)
        else:
            with torch.cuda.device(self.device):
                self._launch(grid, arguments, are_aligned)

    def _launch(self, grid: tuple[int, int, int], arguments: tuple[Any, ...], are_aligned: bool) -> None:
        compiled = self.compiled
        if are_aligned and compiled is not None:  # nearly always
            gpu = driver.active
            stream = gpu.get_current_stream(gpu.get_current_device())
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
            return
        compiled = self.kernel[grid](*arguments, **self.options)  # None in the interpreter
        if are_aligned and IS_KNOWN and isinstance(compiled, CompiledKernel):
            self.compiled = _compiled[self.place] = compiled


@dataclass(frozen=True)
class LaunchPlan:
    """What calls with arguments of the same kind have in common: made once and cached."""

    launcher: Launcher
    numbers: tuple[Any, ...]  # the kernel's last arguments: strides, sizes and constants
    grid: tuple[int, int, int] = (0, 0, 0)  # programs, if all such calls need as many
    tile: tuple[int, int] = (0, 0)  # rows and columns that a program computes, if the grid differs from call to call


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all begin at a multiple of 16 bytes, on which Triton specialises pointers."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return addresses % 16 == 0
