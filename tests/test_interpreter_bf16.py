"""Triton's interpreter computes in bfloat16 as a GPU does, so that tests of kernels in the interpreter are valid."""

import pytest
import torch

pytest.importorskip("triton")
import interpreter_bf16
import triton
import triton.language as tl
from triton import knobs

if not knobs.runtime.interpret:
    pytest.skip("Triton compiles here: set TRITON_INTERPRET=1", allow_module_level=True)


@triton.jit
def narrow_kernel(numbers_pointer, out_pointer, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_pointer + places, tl.load(numbers_pointer + places).to(tl.bfloat16))


@triton.jit
def dot_kernel(a_pointer, b_pointer, out_pointer, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a = tl.load(a_pointer + rows * SIZE + columns, mask=columns < SIZE - 1, other=0.0)
    b = tl.load(b_pointer + rows * SIZE + columns)
    accumulator = tl.full((SIZE, SIZE), 0.5, tl.float32)
    tl.store(out_pointer + rows * SIZE + columns, tl.dot(a, tl.trans(b), accumulator))


@triton.jit
def greater(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def arithmetic_kernel(numbers_pointer, OPERATION: tl.constexpr):
    numbers = tl.load(numbers_pointer + tl.arange(0, 4))
    if OPERATION == "add":
        numbers = numbers + numbers
    elif OPERATION == "compare":
        numbers = greater(numbers, numbers)
    elif OPERATION == "exp":
        numbers = tl.exp2(-numbers)
    elif OPERATION == "scan":
        numbers = tl.associative_scan(numbers, 0, greater)


# Numbers and their bfloat16. Bfloat16 has 7 fraction bits, so around 1 its steps are 2 ** -7.
NARROWED = {
    1 + 2**-8: 1.0,  # half a step above an even number, so rounded down
    1 + 3 * 2**-8: 1 + 2**-6,  # half a step above an odd number, so rounded up
    1 + 2**-8 + 2**-20: 1 + 2**-7,
    -1 - 3 * 2**-8: -1 - 2**-6,
    3.4e38: float("inf"),  # above the largest finite number
    2**-133: 2**-133,  # the smallest subnormal
    float("-inf"): float("-inf"),
    -0.0: -0.0,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_narrowing_rounds_to_nearest_even(dtype):
    numbers = (
        torch.tensor(list(NARROWED)) if dtype.is_floating_point else torch.tensor([0, 1, -3, 257, 259, 2**30, 5, 7])
    )
    wanted = list(NARROWED.values()) if dtype == torch.float32 else numbers.to(dtype).bfloat16().tolist()
    out = torch.empty(8, dtype=torch.bfloat16)
    narrow_kernel[(1,)](numbers.to(dtype), out, 8)
    assert list(map(str, out.tolist())) == list(map(str, wanted))  # compared as text, because -0.0 == 0.0
    narrow_kernel[(1,)](torch.full((8,), float("nan")), out, 8)
    assert out.isnan().all()


def test_dot():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 16)
    wanted = a[:, :-1].double() @ b[:, :-1].double().T + 0.5
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("operation", ["add", "compare", "exp", "scan"])
def test_arithmetic_is_refused(operation):
    with pytest.raises(Exception, match="cannot compute in bfloat16"):
        arithmetic_kernel[(1,)](torch.ones(4, dtype=torch.bfloat16), operation)


def test_an_unknown_triton_is_refused(monkeypatch):
    monkeypatch.setitem(interpreter_bf16.KNOWN, next(iter(interpreter_bf16.KNOWN)), "self other parameters")
    with pytest.raises(RuntimeError, match="cast_impl has changed"):
        interpreter_bf16.mend()
