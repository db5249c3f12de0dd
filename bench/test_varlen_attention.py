"""Benchmark of attention within segments: against padding with ViT-B's heads on CPU, against all rivals on a GPU."""

import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import CUDA, DEVICE, DTYPE, cu_seqlens_of, measure, ragged_lengths, randn, relative_bias, size_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydrop_kernels import ops
from tinydrop_kernels.ops import cuda_extension
from tinydrop_kernels.ops.attention_reference import attend_padded

HEADS, HEAD_DIM = 16, 64
LONGEST_RAGGED = 197  # all patches of a 14 x 14 grid and the class token
# (batch, length or mean length of the segments, True if the lengths differ)
SHAPES = (
    *((256, mean, True) for mean in (20, 50, 99)),
    *((256, length, False) for length in (197, 257, 577)),
    *itertools.product((1, 8), (50, 197), (False,)),
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # a rehearsal on a CPU, whose figures mean nothing
TOLERANCE = 3e-2 if DTYPE == torch.bfloat16 else 1e-4  # as a fraction of a row's norm


@dataclass(frozen=True)
class Run:
    """The implementation and the shape of one benchmark on a GPU."""

    implementation: str
    batch: int
    length: int
    is_ragged: bool
    has_bias: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        lengths = f"mean {self.length}" if self.is_ragged else str(self.length)
        return {"batch": self.batch, "lengths": lengths, "bias": self.has_bias}

    def __str__(self) -> str:
        bias = "-bias" if self.has_bias else ""
        return f"{self.implementation}-b{self.batch}-{'mean' * self.is_ragged}{self.length}{bias}"


class Layout(NamedTuple):
    """The layout of a batch. It is not timed, because all layers of a model share it."""

    cu_seqlens: Tensor
    longest: int
    bias: ops.RelativeBias | None
    packed_rows: Tensor  # packed row of each position of the padded batch
    padded_rows: Tensor  # position in the padded batch of each packed row
    key_mask: Tensor  # (batch, 1, 1, width), added to the scores

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self.cu_seqlens, self.cu_seqlens, self.longest, self.longest


def layout_of(run: Run) -> Layout:
    if run.is_ragged:
        lengths = ragged_lengths(run.length, run.batch, LONGEST_RAGGED)
    else:
        lengths = torch.full((run.batch,), run.length, dtype=torch.int32, device=DEVICE)
    cu_seqlens, longest = cu_seqlens_of(lengths), int(lengths.max())
    # A multiple of 8, because attention copies a mask of another width in every call.
    place = torch.arange(-(-longest // 8) * 8, device=DEVICE)
    is_token = place < lengths[:, None]
    packed_rows = (cu_seqlens[:-1, None] + place).clamp(max=int(cu_seqlens[-1]) - 1).flatten()
    key_mask = torch.zeros(is_token.shape, device=DEVICE, dtype=DTYPE).masked_fill_(~is_token, float("-inf"))
    bias = relative_bias(lengths, HEADS) if run.has_bias else None
    return Layout(cu_seqlens, longest, bias, packed_rows, is_token.flatten().nonzero()[:, 0], key_mask[:, None, None])


def own(layout: Layout) -> Callable:
    def call(qkv, query, key, value):
        return ops.varlen_attention(query, key, value, *layout.lengths, bias=layout.bias)

    return call


def flash_attention_2(layout: Layout) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    return lambda qkv, query, key, value: varlen_attn(query, key, value, *layout.lengths)


def flash_attention_3(layout: Layout) -> Callable:
    from fa3_fwd_interface import flash_attn_varlen_func

    def call(qkv, *projections):
        out = flash_attn_varlen_func(*projections, *layout.lengths)
        return out[0] if isinstance(out, tuple) else out  # some releases also return the log-sum-exp

    return call


def cudnn(layout: Layout) -> Callable:
    """Return varlen_attn's cuDNN operator. It is called directly, because varlen_attn in torch 2.11 never uses it."""
    attend = torch.ops.aten._cudnn_attention_forward.default
    flags = True, 0.0, False, False  # log-sum-exp (as varlen_attn), dropout, causal, debug mask
    return lambda qkv, *projections: attend(*projections, None, *layout.lengths, *flags)[0]


def padded(layout: Layout) -> Callable:
    """Return a call that pads to the longest segment, masks the padded keys and packs the result."""
    batch, width = layout.key_mask.shape[0], layout.key_mask.shape[3]

    def call(qkv, *projections):
        rows = qkv.index_select(0, layout.packed_rows).view(batch, width, 3, HEADS, HEAD_DIM)
        query, key, value = rows.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=layout.key_mask)
        return out.transpose(1, 2).reshape(-1, HEADS, HEAD_DIM).index_select(0, layout.padded_rows)

    return call


def dense(layout: Layout) -> Callable:
    """Return a call that reshapes segments of equal length to a dense batch."""

    def call(qkv, *projections):
        batch = qkv.view(-1, layout.longest, 3, HEADS, HEAD_DIM)
        out = F.scaled_dot_product_attention(*batch.permute(2, 0, 3, 1, 4))
        return out.transpose(1, 2).reshape(-1, HEADS, HEAD_DIM)

    return call


OWN = ("triton", "cuda")
IMPLEMENTATIONS = {
    **dict.fromkeys(OWN, own),
    "varlen_attn": flash_attention_2,
    "fa3": flash_attention_3,
    "padded": padded,
    "dense": dense,
    "cudnn": cudnn,
}


def runs() -> list[Run]:
    found = []
    for name in IMPLEMENTATIONS:
        found += [Run(name, *shape) for shape in SHAPES if name != "dense" or not shape[2]]
        if name in OWN:
            plain = [Run(name, *shape) for shape in SHAPES if shape[0] == 256 and shape[1] <= LONGEST_RAGGED]
            found += [replace(run, has_bias=True) for run in plain]
    return found


def chosen(layout: Layout, qkv: Tensor, *projections: Tensor) -> str:
    """Return the name of the package's implementation that runs."""
    bias = layout.bias or (None, None, (1, 1))
    return ops.OPERATORS["varlen_attention"].choose(*projections, *layout.lengths, None, *bias, 0).name


def row_error(out: Tensor, wanted: Tensor) -> float:
    return ((out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@pytest.mark.parametrize("run", runs() if CUDA or INTERPRETED else [], ids=str)
def test_rivals(run, benchmark):
    is_own = run.implementation in OWN
    if run.implementation == "cuda" and not cuda_extension.available():
        pytest.skip(f"cuda: {cuda_extension.WHY_NOT}")
    layout = layout_of(run)
    total = int(layout.cu_seqlens[-1])

    def make_arguments():
        qkv = randn(total, 3, HEADS, HEAD_DIM)
        return qkv, *qkv.unbind(1)

    arguments = make_arguments()
    bias = layout.bias and layout.bias._replace(table=layout.bias.table.float())
    starts, longest = layout.cu_seqlens, layout.longest
    query, key, value = (t.float() for t in arguments[1:])
    wanted = attend_padded(query, key, value, starts, starts[:-1], starts[1:], longest, longest, None, bias)
    benchmark.extra_info["is_default"] = is_own and chosen(layout, *arguments) == run.implementation
    moved_bytes = 4 * size_of(arguments[1]) + size_of(layout.cu_seqlens)
    if layout.bias:
        moved_bytes += size_of(layout.bias.table, layout.bias.positions)
    lengths = layout.cu_seqlens.diff().long()
    flops = 4 * int(lengths.square().sum()) * HEADS * HEAD_DIM

    # Force FlashAttention-2, because newer varlen_attn may choose cuDNN, which is a rival of its own here.
    flash_alone = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if run.implementation == "varlen_attn" else nullcontext()
    with ops.use_backend(run.implementation if is_own else "auto"), flash_alone:
        if is_own and chosen(layout, *arguments) != run.implementation:
            pytest.skip(f"{run.implementation}: does not take these arguments")
        try:
            function = IMPLEMENTATIONS[run.implementation](layout)
            error = row_error(function(*arguments), wanted)
            assert error <= TOLERANCE, f"a row is off by {error:.2g} of its norm"
            call = ("varlen_attention", run.implementation, run.implementation, run.labels, function, make_arguments)
            measure(benchmark, *call, moved_bytes, flops)
        except Exception as error:
            if is_own or isinstance(error, pytest.exit.Exception):
                raise
            reason = str(error).strip().split("\n")[0][:100]
            pytest.skip(f"{run.implementation}: {type(error).__name__}: {reason}")


def user(query, key, value, index, mask):
    """Pad query, key and value to the longest segment, mask the padded keys, and pack the result."""

    def padded(packed):
        rows = packed.new_zeros(mask.numel(), *packed.shape[1:]).index_copy_(0, index, packed)
        return rows.view(*mask.shape, *packed.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), attn_mask=mask[:, None, None])
    return out.transpose(1, 2).flatten(0, 1)[index]


@pytest.mark.skipif(CUDA, reason="on a GPU test_rivals times attention")
def test_varlen_attention(case, compare):
    heads, head_dim = 12, 64
    spread = torch.linspace(0.5, 1.5, case.batch) if case.batch > 1 else torch.ones(1)
    lengths = ((case.kept * spread).int() + 1).to(DEVICE)
    cu_seqlens = cu_seqlens_of(lengths)
    longest, total = int(lengths.max()), int(cu_seqlens[-1])
    mask = torch.arange(longest, device=DEVICE) < lengths[:, None]
    index = mask.flatten().nonzero()[:, 0]

    def make_arguments():
        return tuple(randn(total, 3, heads, head_dim).unbind(1))

    def own(query, key, value):
        return ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, longest, longest)

    def eager(query, key, value):
        return user(query, key, value, index, mask)

    query, _, _ = make_arguments()
    flops = 4 * int(lengths.long().square().sum()) * heads * head_dim
    compare("varlen_attention", own, eager, make_arguments, 4 * size_of(query) + size_of(cu_seqlens), flops)
