"""An emulation of reduced-precision float32 products. Operands are rounded as torch's current settings allow."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

BITS = {"tf32": 10, "bf16": 7}  # bits of the mantissa; float32 has 23
CONVOLUTIONS = {"aten::convolution": (0, 1), "aten::conv2d": (0, 1)}  # positions of the operands among the arguments
PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::matmul": (0, 1), "aten::linear": (0, 1)}
PRODUCTS |= {"aten::addmm": (1, 2), "aten::baddbmm": (1, 2), "mkldnn::_linear_pointwise": (0, 1)}


def rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Round a float32 tensor to this many bits of mantissa, to nearest, with ties away from zero."""
    dropped = 23 - bits
    whole = tensor.contiguous().view(torch.int32) + (1 << dropped - 1)
    return (whole >> dropped << dropped).view(torch.float32)


class RoundingProducts(TorchDispatchMode):
    """A dispatch mode that rounds operands as a GPU's tensor cores do, or as a CPU's AMX does if ``on_cpu`` is set.

    The package's own operators are not rounded.
    """

    def __init__(self, on_cpu: bool = False):
        super().__init__()
        backends, self.rounded = torch.backends, 0
        self.settings = (
            (backends.mkldnn.conv, backends.mkldnn.matmul) if on_cpu else (backends.cudnn.conv, backends.cuda.matmul)
        )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for setting, operators in zip(self.settings, (CONVOLUTIONS, PRODUCTS), strict=True):
            bits, operands = BITS.get(setting.fp32_precision), operators.get(function.name(), ())
            if bits and operands:
                self.rounded += 1
                args = tuple(self._rounded(a, bits) if place in operands else a for place, a in enumerate(args))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
        # Weights in oneDNN's layout have no strides and cannot be viewed as integers, so they are not rounded.
        is_float32 = tensor.dtype == torch.float32 and tensor.layout == torch.strided
        return rounded(tensor, bits) if is_float32 else tensor
