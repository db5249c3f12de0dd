"""Tests of kernel launches that bypass Triton's argument binder.

They run on a fake GPU that does nothing, in a process without the interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from unittest import mock
from host import IdleGpu, attention_calls, front_end_calls, kernels_first
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tinydrop_kernels import ops
from tinydrop_kernels.ops import registry
from tinydrop_kernels.ops.kernels import launcher as direct

launched, bound = [], []

class Recorder(IdleGpu):
    def launcher_cls(self, src, metadata):
        idle = super().launcher_cls(src, metadata)
        def launch(*arguments):
            idle(*arguments)
            launched.append((src.fn.__name__, src.hash(), arguments[:3], arguments[9:]))
        return launch

def counting(self, *args, **kwargs):
    bound.append(self.fn.__name__)
    return run(self, *args, **kwargs)

def of(call):
    launched.clear(), bound.clear()
    call()
    return [(name, key, grid, [a.data_ptr() if torch.is_tensor(a) else a for a in given])
            for name, key, grid, given in launched], list(bound)

driver.set_active(Recorder(90))
run = JITFunction.run
with torch.inference_mode(), mock.patch.object(registry, "_preference", kernels_first), \\
        mock.patch.object(JITFunction, "run", counting):
    for name, call in (attention_calls() | front_end_calls()).items():
        call()
        direct_way, was_bound = of(call)
        assert direct_way and not was_bound, (name, was_bound)
        with mock.patch.object(direct.Launcher, "__call__", lambda self, grid, arguments, are_aligned=True:
                               self.kernel[grid](*arguments, **self.options)):
            tritons_way, was_bound = of(call)
        assert len(was_bound) == len(direct_way)
        for one, other in zip(direct_way, tritons_way, strict=True):
            assert one[:3] == other[:3], (name, one, other)
            assert len(one[3]) == len(other[3])
            # Only addresses may differ, because each call allocates its results anew.
            differ = [(a, b) for a, b in zip(one[3], other[3]) if a != b]
            assert all(type(a) is int and a > 2**32 for a, _ in differ), (name, differ)

    # A change of anything that a kernel is specialised for selects another binary.
    def attention(dtype=torch.bfloat16, head_dim=64, shift=0, longest=50, bias=False, gap=0):
        rows = torch.zeros(50 * (3 * 4 * head_dim + gap) + 8, dtype=dtype)[shift:]
        qkv = rows.as_strided((50, 3, 4, head_dim), (3 * 4 * head_dim + gap, 4 * head_dim, head_dim, 1)).unbind(1)
        cu_seqlens = torch.tensor([0, 50], dtype=torch.int32)
        given = ops.RelativeBias(torch.zeros(732, 4, dtype=dtype), torch.zeros(50).int(), (14, 14)) if bias else None
        return lambda: ops.varlen_attention(*qkv, cu_seqlens, cu_seqlens, 50, longest, None, given)

    hashes = set()
    kinds = ({}, {"dtype": torch.float16}, {"head_dim": 72}, {"longest": 200}, {"bias": True}, {"gap": 4})
    for kind in kinds:
        call = attention(**kind)
        call()
        found, was_bound = of(call)
        assert not was_bound, kind
        hashes.add(found[0][1])
    assert len(hashes) == len(kinds), len(hashes)
    call = attention(shift=4)  # not aligned to 16 bytes, so Triton must check every call
    call()
    found, was_bound = of(call)
    assert was_bound == ["varlen_attention_kernel"] and found[0][1] not in hashes

    # int64 arguments must select another binary, because the int32 binary would misread their memory.
    counts, pixels = torch.tensor([3, 2], dtype=torch.int32), torch.zeros(2, 3, 8, 8)
    indices = torch.tensor([[0, 1, 2], [0, 3, -1]], dtype=torch.int32)
    starts = torch.tensor([0, 4, 7], dtype=torch.int32)
    weight, prefix = torch.zeros(8, 3, 4, 4), torch.zeros(1, 8)

    def packing(levels):
        return lambda: torch.ops.tinydrop.pack(counts, levels, 5, 1)

    def embedding(indices):
        return lambda: ops.embed_tokens(pixels, weight, None, prefix, None, indices, starts, 7)

    for make, given in ((packing, torch.zeros(2, dtype=torch.int32)), (embedding, indices)):
        found = []
        for numbers in (given, given.long()):
            make(numbers)()
            found.append(of(make(numbers))[0][0][1])
        assert found[0] != found[1], make
print("right")
"""


@pytest.mark.slow
def test_what_is_launched_is_what_triton_would_launch():
    pytest.importorskip("triton", reason="there is no Triton on this platform to compile with")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "bench")))
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "right\n"
