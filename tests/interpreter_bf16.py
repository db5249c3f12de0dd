"""A correction of bfloat16 in Triton's interpreter, which stores it as 16-bit integers in NumPy.

Loads, stores, moves and the cast to float32 are correct without changes. Two operations are replaced here: the cast to
bfloat16, which truncates instead of rounding, and ``tl.dot``, which multiplies the bits as integers. Any other
arithmetic on bfloat16 raises TypeError, because it would compute on the bits. A kernel must therefore cast what it
loads to float32, as all kernels of this package do.
"""

import inspect

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

# The methods that are replaced, with their parameters in Triton 3.6 to 3.9.
KNOWN = {
    InterpreterBuilder.cast_impl: "self src dst_type",
    InterpreterBuilder.create_dot: "self a b d input_precision max_num_imprecise_acc",
    InterpreterBuilder.unary_op: "self arg op",
    InterpreterBuilder.binary_op: "self lhs rhs op",
    InterpreterBuilder.ternary_op: "self lhs rhs other op",
    InterpreterBuilder.create_fma: "self x y z",
    InterpreterBuilder.create_rsqrt: "self arg",
    InterpreterBuilder.create_erf: "self arg",
    ReduceScanOpInterface.check_tensor: "self input",
}


def is_bfloat16(value) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    """Cast bfloat16 to float32. Return any other dtype unchanged."""
    if not is_bfloat16(handle):
        return handle
    return TensorHandle(torch.tensor(handle.data).view(torch.bfloat16).float().numpy(), tl.float32)


def narrowed(handle: TensorHandle) -> TensorHandle:
    """Round any number to the nearest bfloat16, with ties to even."""
    rounded = torch.tensor(handle.data.astype(np.float32)).bfloat16()
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def refusing(method):
    """Return the method with a TypeError for bfloat16 operands. ``tl.where`` is allowed, because it only moves bits."""

    def run(self, *args):
        operands = args[0] if isinstance(args[0], tuple) else args
        if args[-1] is not np.where and any(is_bfloat16(operand) for operand in operands):
            raise TypeError(f"{method.__name__}: the interpreter cannot compute in bfloat16; widen to float32 first")
        return method(self, *args)

    return run


def mend() -> None:
    """Replace the interpreter's methods. Call this once per process, after TRITON_INTERPRET is set.

    Raises:
        RuntimeError: The interpreter of this Triton version differs from the versions in ``KNOWN``.
    """
    for method, parameters in KNOWN.items():
        if list(inspect.signature(method).parameters) != parameters.split():
            raise RuntimeError(f"Triton {triton.__version__}: {method.__qualname__} has changed, see {__file__}")
    if interpreter._get_np_dtype(tl.bfloat16) != np.uint16:
        raise RuntimeError(f"Triton {triton.__version__}: bfloat16 is no longer held as uint16, see {__file__}")

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        return narrowed(widened(src)) if dst_type.scalar == tl.bfloat16 else cast(self, widened(src), dst_type)

    def create_dot(self, a, b, d, *precision):
        return dot(self, widened(a), widened(b), d, *precision)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_rsqrt", "create_erf"):
        setattr(InterpreterBuilder, name, refusing(getattr(InterpreterBuilder, name)))
    ReduceScanOpInterface.check_tensor = refusing(ReduceScanOpInterface.check_tensor)
