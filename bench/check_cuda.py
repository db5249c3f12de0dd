"""Every kernel against the reference, on the GPU that is here (or in Triton's interpreter, TRITON_INTERPRET=1).

    python bench/check_cuda.py [--dtype float32] [--longest 129] [check ...]

Prints a line for each check and exits with 1 if one is wrong. float32, float16 and bfloat16; outputs are poisoned with
NaN before each launch. Indices, counts and layouts must be exact; floating-point rows are compared, each by its norm,
with the reference in float64. Attention is checked in every implementation that the dispatcher may choose.
"""

import argparse
import functools
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from measure import CUDA, DEVICE, cu_seqlens_of, ops
from torch import Tensor

from tinydrop_kernels.ops import attention_backends, cuda, reference
from tinydrop_kernels.ops.attention_arguments import AttentionArguments

# Of a row's norm: sums in float32, and one rounding to the type of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE) if CUDA else [torch.float32, torch.float16]  # the interpreter's bfloat16 is wrong
# Smaller than a tile, ViT's own, primes, DINOv2's at 518 pixels, and the largest there is to be: all odd in their way.
GRIDS = ((1, 1), (5, 7), (14, 14), (16, 12), (37, 37), (64, 64)) if CUDA else ((1, 1), (5, 7), (14, 14))
MIXED = (0.2, 0.0, 1.0, 1e-9, 0.97, 0.5)  # fractions kept: an exit, everything, one patch, all but a few


def poison() -> None:
    """What the package takes uninitialised is NaN, so that an element that a kernel forgets shows."""

    def poisoned(create: Callable) -> Callable:
        def empty(*args, **kwargs):
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(2**30)
            return tensor

        return empty

    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def kernel(operator: Callable, *arguments):
    with ops.use_backend("triton"):
        return operator(*arguments)


def assert_exact(out: Tensor, wanted: Tensor) -> None:
    wrong = (out != wanted).sum().item()
    assert out.dtype == wanted.dtype and not wrong, f"{wrong} of {out.numel()} differ"


def assert_rows(out: Tensor, wanted: Tensor) -> None:
    """Each row's distance from the float64 reference, relative to the row's norm."""
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-3)
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= TOLERANCE[out.dtype], f"a row is off by {worst:.2g} of its norm"  # false for NaN


def upcast(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def ragged(grid: tuple[int, int], prefix: int, summary: bool) -> tuple[Tensor, Tensor, int]:
    """Indices, cu_seqlens and total of a batch that keeps MIXED."""
    num_patches = grid[0] * grid[1]
    counts = (torch.tensor(MIXED) * num_patches).ceil().int().to(DEVICE)
    order = torch.rand(len(counts), num_patches, device=DEVICE).argsort(dim=1)
    kept_first = torch.where(torch.arange(num_patches, device=DEVICE) < counts[:, None], order, num_patches)
    indices = kept_first.sort(dim=1).values
    indices = indices.masked_fill(indices == num_patches, -1).int()
    cu_seqlens, sizes = reference.pack(counts, num_patches, prefix, summary)
    return indices, cu_seqlens, int(sizes[1])


def assert_selection(selection: ops.Selection, logits: Tensor, saliency: Tensor, law: tuple) -> None:
    """Saliency within rounding of the float64 one; from there on everything follows exactly, ties included."""
    grid = (selection.saliency.shape[1], selection.saliency.shape[2])
    _, _, confidence, resized = reference.select_from_saliency(logits, saliency, grid, *law)
    torch.testing.assert_close(selection.confidence, confidence, rtol=1e-5, atol=1e-6)
    scale = saliency.abs().nan_to_num(0).max().item()
    torch.testing.assert_close(selection.saliency, resized, rtol=0, atol=1e-5 * scale + 1e-6, equal_nan=True)
    assert_exact(selection.counts, reference.keep_counts(selection.confidence, grid[0] * grid[1], *law))

    places = torch.arange(grid[0] * grid[1], device=DEVICE)
    scores = selection.saliency.flatten(1)
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    kept = torch.where(places < selection.counts[:, None], order, len(places)).sort(dim=1).values
    assert_exact(selection.indices, kept.masked_fill(kept == len(places), -1).int())


LAWS = ((0.7, 1.5, 0.1), (None, 0.3, 0.05), (None, 0.0, 0.25))  # tau, gamma, min_keep


def select_from_saliency() -> Iterator[None]:
    sizes = (7, 7), (3, 5), (20, 11)
    for dtype, grid, (law, size) in itertools.product(DTYPES, GRIDS, zip(LAWS, sizes, strict=True)):
        logits = 3 * randn(len(MIXED), 11, dtype=dtype)
        saliency = randn(len(MIXED), *size, dtype=dtype).relu()  # half of them tie at 0
        saliency[1, 0, 0] = float("nan")
        selection = kernel(ops.select_from_saliency, logits, saliency, grid, *law)
        assert_selection(selection, logits, saliency, law)
        normalised = kernel(ops.select_from_saliency, logits, saliency, grid, *law, True)
        wanted = reference.select_from_saliency(logits, saliency, grid, *law, True)[3]
        torch.testing.assert_close(normalised.saliency, wanted, rtol=0, atol=1e-5, equal_nan=True)
        assert_exact(normalised.indices, selection.indices)
        yield


def select_tokens() -> Iterator[None]:
    sizes = (7, 7), (3, 5), (17, 17)
    for dtype, grid, (law, size) in itertools.product(DTYPES, GRIDS, zip(LAWS, sizes, strict=True)):
        channels = 448 if size == (7, 7) else 37
        features = randn(len(MIXED), size[0] * size[1], channels, dtype=dtype)
        if law[0] is None:  # the other memory layout
            features = features.transpose(1, 2).contiguous().transpose(1, 2)
        weight = randn(1000, channels, dtype=dtype)
        logits = randn(len(MIXED), 1000, dtype=dtype)
        logits[torch.arange(len(MIXED)), torch.arange(0, 900, 150)] += 8  # no ties, and confidences of all sizes
        selection = kernel(ops.select_tokens, logits, features, weight, size, grid, *law)
        saliency = torch.einsum("blc,bc->bl", features.double(), weight[logits.argmax(1)].double()).relu()
        assert_selection(selection, logits, saliency.float().view(-1, *size), law)
        yield


def pack() -> Iterator[None]:
    for batch, prefix, summary in itertools.product((1, 2, 255, 1024, 5000), (0, 1, 5), (False, True)):
        for least in (0, 195, 196):
            counts = torch.randint(least, 197, (batch,), dtype=torch.int32, device=DEVICE)
            counts *= torch.rand(batch, device=DEVICE) < 0.7
            wanted = reference.pack(counts, 196, prefix, summary)
            for one, other in zip(kernel(torch.ops.tinydrop.pack, counts, 196, prefix, summary), wanted, strict=True):
                assert_exact(one, other)
            yield


def embed_tokens() -> Iterator[None]:
    # Every geometry is compiled for itself: one of each patch size, with a width that fills tiles or does not.
    shapes = (((5, 7), (8, 8), 40), ((37, 37), (14, 14), 384), ((14, 14), (16, 16), 768), ((3, 2), (32, 32), 200))
    for dtype, (grid, patch, dim), channels_last in itertools.product(DTYPES, shapes if CUDA else shapes[::3], (0, 1)):
        for summary, prefix, plain in ((False, 1, False), (True, 5, False), (True, 0, True)):
            images = randn(len(MIXED), 3, grid[0] * patch[0] + 3, grid[1] * patch[1] + 1, dtype=dtype)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            weight = randn(dim, 3, *patch, dtype=dtype) / (3 * patch[0] * patch[1]) ** 0.5
            bias, pos_embed = (
                (None, None) if plain else (randn(dim, dtype=dtype), randn(grid[0] * grid[1], dim, dtype=dtype))
            )
            rows = randn(prefix, dim, dtype=dtype)
            arguments = (images, weight, bias, rows, pos_embed, *ragged(grid, prefix, summary), summary)
            assert_rows(kernel(ops.embed_tokens, *arguments), reference.embed_tokens(*upcast(arguments)))
            yield


def gather_tokens() -> Iterator[None]:
    for dtype, grid, dim in itertools.product(DTYPES, GRIDS, (13, 384) if CUDA else (13,)):
        for summary, prefix, plain in ((False, 1, False), (True, 5, False), (True, 0, True)):
            tokens = randn(len(MIXED), grid[0] * grid[1], dim, dtype=dtype)
            if plain:  # a feature map's tokens
                tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
            pos_embed = None if plain else randn(grid[0] * grid[1], dim, dtype=dtype)
            rows = randn(len(MIXED), prefix, dim, dtype=dtype) if summary else randn(prefix, dim, dtype=dtype)
            arguments = (tokens, rows, pos_embed, *ragged(grid, prefix, summary), summary)
            assert_rows(kernel(ops.gather_tokens, *arguments), reference.gather_tokens(*upcast(arguments)))
            yield


def segment_pool() -> Iterator[None]:
    lengths = torch.tensor([0, 1, 33, 0, 2, 197, 6, 1370, 0], device=DEVICE)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    for dtype, mode, skip, dim in itertools.product(DTYPES, ("first", "mean", "max"), (0, 1, 5), (13, 768)):
        tokens = randn(int(cu_seqlens[-1]), dim, dtype=dtype)
        wanted = reference.segment_pool(tokens.double(), cu_seqlens, mode, skip)
        assert_rows(kernel(ops.segment_pool, tokens, cu_seqlens, mode, skip), wanted)
        yield


# On both sides of every tile and of its rows, ViT's own (50, 197, 257), and 577 and 1370 (384 and 518 pixels).
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 50, 63, 64, 65, 99, 127, 128, 129, 197, 198, 257, 577, 1370]
LONGEST = (16, 32, 64, 128, 198, 1370)  # a batch of all lengths up to each: every tile of Triton's table is used
HEADS, GRID = 3, (5, 7)
NORM_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the whole output's norm
# compute-sanitizer sees where a tensor ends only if the allocator does not keep memory, and then it serves no graph.
SANITIZED = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ
MARGIN = 0 if SANITIZED else 128  # rows of NaN before and behind what may be read


class NotHereError(Exception):
    """This machine has no such implementation."""


def projections(total: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value as views of one projection, as timm's attention leaves them."""
    rows = torch.full((MARGIN + total + MARGIN, 3, HEADS, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    return rows[MARGIN : MARGIN + total].copy_(torch.randn(total, 3, HEADS, head_dim, device=DEVICE)).unbind(1)


def bias_of(total: int, dtype: torch.dtype, class_token: bool) -> ops.RelativeBias:
    """A table that lies head after head, and anywhere a class token if there is one."""
    rows, columns = GRID
    distances = (2 * rows - 1) * (2 * columns - 1) + 3 * class_token
    positions = torch.randint(-class_token, rows * columns, (total,), dtype=torch.int32, device=DEVICE)
    return ops.RelativeBias(randn(HEADS, distances, dtype=dtype).t(), positions, GRID)


class Attention(NamedTuple):
    """A call of ops.varlen_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    scale: float | None = None
    bias: ops.RelativeBias | None = None

    @property
    def arguments(self) -> AttentionArguments:
        """As the implementations take them."""
        return AttentionArguments(*self[:8], *(self.bias or ()))


def segments(lengths_q: list[int], lengths_k: list[int]) -> tuple[Tensor, Tensor, int, int]:
    cu_seqlens = (cu_seqlens_of(torch.tensor(n, dtype=torch.int32, device=DEVICE)) for n in (lengths_q, lengths_k))
    return *cu_seqlens, max(lengths_q), max(lengths_k)


def attention_cases(dtype: torch.dtype) -> Iterator[Attention]:
    for longest in (bound for bound in LONGEST if bound <= LENGTHS[-1]):
        lengths = [n for n in LENGTHS if n <= longest]
        lengths = lengths[1::2] + lengths[::2]  # long and short ones, and an empty one, beside one another
        total, places = sum(lengths), segments(lengths, lengths)
        for head_dim in (16, 64, 72, 88, 128):
            yield Attention(*projections(total, head_dim, dtype), *places)
        for head_dim, class_token in ((64, True), (88, False)):  # one for each width of tiles: compiling takes long
            yield Attention(*projections(total, head_dim, dtype), *places, bias=bias_of(total, dtype, class_token))
        (query, _, _), (_, key, value) = projections(len(lengths), 64, dtype), projections(total, 64, dtype)
        yield Attention(query, key, value, *segments([1] * len(lengths), lengths))  # as of an attention pool
        query, _, _ = projections(total, 64, dtype)
        yield Attention(query, key, value, *segments(lengths, lengths[1:] + lengths[:1]))  # one of them without keys

    lengths = [n for n in LENGTHS if n <= 65]
    query, key, value = projections(sum(lengths), 64, dtype)
    places = segments(lengths, lengths)
    yield Attention(30 * query, 30 * key, value, *places)  # scores of thousands
    yield Attention(30 * query, 30 * key, value, *places, scale=1.0)
    yield Attention(torch.zeros_like(query), key, value, *places)  # equal scores
    yield Attention(query, key, value, *places, scale=0.5, bias=bias_of(sum(lengths), dtype, True))
    for first, second in ((0, 0), (0, 1), (1, 2)):  # contiguous, heads outermost, columns apart
        moved = (t.transpose(first, second).contiguous().transpose(first, second) for t in (query, key, value))
        yield Attention(*moved, *places)
    yield Attention(*projections(0, 64, dtype), *segments([0, 0], [0, 0]))


def attention_in_float64(case: Attention) -> tuple[Tensor, float]:
    """By the formula, segment by segment, on the CPU; and the greatest score."""
    query, key, value = (t.double().cpu() for t in case[:3])
    scale = query.shape[2] ** -0.5 if case.scale is None else case.scale
    out, greatest = torch.zeros_like(query, memory_format=torch.contiguous_format), 0.0
    segments_of = (itertools.pairwise(cu_seqlens.tolist()) for cu_seqlens in case[3:5])
    for (q0, q1), (k0, k1) in zip(*segments_of, strict=True):
        if q1 == q0 or k1 == k0:
            continue
        scores = scale * torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1])
        if case.bias is not None:
            positions = case.bias.positions.cpu()
            index = reference.relative_position_index(positions[q0:q1], positions[k0:k1], GRID)
            scores += case.bias.table.double().cpu()[index].permute(2, 0, 1)
        greatest = max(greatest, scores.abs().max().item())
        out[q0:q1] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value[k0:k1])
    return out, greatest


def assert_attention(case: Attention, out: Tensor) -> None:
    """The whole output by its norm, and no row of a head much worse."""
    wanted, greatest = attention_in_float64(case)
    assert out.is_contiguous() and out.shape == wanted.shape and out.dtype == case.query.dtype
    error = (out.double().cpu() - wanted).norm(dim=-1)
    whole = (error.norm() / wanted.norm().clamp(min=1e-30)).item()
    worst = (error / wanted.norm(dim=-1).clamp(min=1e-30)).max().item() if error.numel() else 0.0
    # Rounding a score to float32 changes its weight by a factor as far from 1 as the score was from its rounding.
    tolerance = max(NORM_TOLERANCE[out.dtype], greatest * torch.finfo(torch.float32).eps)
    assert whole <= tolerance, f"off by {whole:.2g} of the norm, not {tolerance:.2g}"  # false for NaN
    assert worst <= 4 * tolerance, f"a row is off by {worst:.2g} of its norm, not {4 * tolerance:.2g}"


def assert_replays(implementation: attention_backends.Implementation, case: Attention, other: Attention) -> None:
    """A graph of one case, on the values and segments of another."""
    implementation.launch(*case.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = implementation.launch(*case.arguments)
    for tensor, changed in zip(case[:5], other[:5], strict=True):
        tensor.copy_(changed)
    graph.replay()
    assert_attention(case, out)


def varlen_attention(implementation: attention_backends.Implementation) -> Iterator[None]:
    if not implementation.runs_on(DEVICE.type):
        raise NotHereError(cuda.WHY_NOT if implementation.name == "cuda" and CUDA else f"not for {DEVICE.type}")
    for dtype in DTYPES:
        for case in attention_cases(dtype):
            if implementation.takes(case.arguments):
                # Freed at once, so that what C++ allocates next is likely to be this memory.
                torch.full_like(case.query, float("nan"))
                assert_attention(case, implementation.launch(*case.arguments))
                yield
        lengths = [n for n in LENGTHS if n <= 65]
        case, other = (
            Attention(*projections(sum(lengths), 64, dtype), *segments(n, n)) for n in (lengths, lengths[::-1])
        )
        if CUDA and not SANITIZED and implementation.takes(case.arguments):
            assert_replays(implementation, case, other)
            yield


OPERATORS = (select_tokens, select_from_saliency, pack, embed_tokens, gather_tokens, segment_pool)
CHECKS: dict[str, Callable[[], Iterator[None]]] = {check.__name__: check for check in OPERATORS} | {
    f"varlen_attention_{implementation.name}": functools.partial(varlen_attention, implementation)
    for implementation in attention_backends.IMPLEMENTATIONS
}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="check", help=", ".join(CHECKS))
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES], help="this one only")
    parser.add_argument(
        "--longest", type=int, default=1370 if CUDA else 65, help="leave out attention's longer segments"
    )
    args = parser.parse_args()
    if unknown := set(args.checks) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    if args.dtype:
        DTYPES[:] = [getattr(torch, args.dtype)]
    LENGTHS[:] = [length for length in LENGTHS if length <= args.longest]
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # the tolerances are of float32 proper
    poison()
    failed = False
    types = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    for name in args.checks or CHECKS:
        torch.manual_seed(0)
        done = 0
        try:
            for _ in CHECKS[name]():
                done += 1
            print(
                f"{name}, {types}: " + (f"right in {done} cases" if done else "NOT CHECKED, it takes none"), flush=True
            )
        except NotHereError as reason:
            print(f"{name}: NOT CHECKED, {reason}", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{name}, {types}: WRONG in case {done}", flush=True)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
