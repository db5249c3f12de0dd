"""Every kernel against the reference, on the GPU that is here (or in Triton's interpreter, TRITON_INTERPRET=1).

    python bench/check_cuda.py [--dtype float32] [operator ...]

Prints a line for each operator and exits with 1 if one is wrong. float32, float16 and bfloat16; outputs are poisoned
with NaN before each launch. Indices, counts and layouts must be exact; floating-point rows are compared, each by its
norm, with the reference in float64.
"""

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from measure import CUDA, DEVICE, ops
from torch import Tensor

from tinydrop_kernels.ops import reference

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
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

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


CHECKS = (select_tokens, select_from_saliency, pack, embed_tokens, gather_tokens, segment_pool)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", metavar="operator", help=", ".join(c.__name__ for c in CHECKS))
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in DTYPES], help="this one only")
    args = parser.parse_args()
    if args.dtype:
        DTYPES[:] = [getattr(torch, args.dtype)]
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # the tolerances are of float32 proper
    poison()
    failed = False
    types = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
    for check in CHECKS:
        name = check.__name__
        if args.operators and name not in args.operators:
            continue
        if not ops.KERNELS[name]:
            print(f"{name}: NOT CHECKED, it has no kernel")
            failed = True
            continue
        torch.manual_seed(0)
        done = 0
        try:
            for _ in check():
                done += 1
            print(f"{name}, {types}: right in {done} cases", flush=True)
        except Exception:
            traceback.print_exc()
            print(f"{name}, {types}: WRONG in case {done}", flush=True)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
