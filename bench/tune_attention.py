"""Which tiles attention's Triton kernel should have, on the GPU that is here: tries many, and prints the fastest.

    python bench/tune_attention.py [--dtype bfloat16] [--head-dim 64 ...] [--processes N]

For each longest segment of the tables in ops/kernels/attention_tiles.py, with and without a bias, the geometric mean
of batches of 256 under a CUDA graph: equal lengths, ragged ones where a ViT has them, and those that the default policy
gives. Prints every time, then the tables as they would be written, the shipped tile beside the fastest. Answers are
compared with the shipped tile's. By calculation some 6 minutes on 16 cores for one head_dim; most of it goes into
compiling, which many processes do first.
"""

import argparse
import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from measure import (
    DEVICE,
    Rotation,
    cu_seqlens_of,
    graph_us,
    num_argument_sets,
    ragged_lengths,
    relative_bias,
    size_of,
    spin,
)
from torch import Tensor

from tinydrop_kernels.ops import apply_law
from tinydrop_kernels.ops.kernels import attention as kernel
from tinydrop_kernels.ops.kernels.attention_tiles import LONG, Tile, tile_for
from tinydrop_kernels.policy.drop import DropPolicy

BATCH, HEADS = 256, 16
LEVELS = [(side, side) for side in (14, 12, 11, 9, 7)]  # the grids an image may have, of ViT's at 224 pixels
# Longest segment: the lengths of its batches. "mean 20" is ragged, and its longest is twice its mean; "policy" is what
# the default policy leaves of a 14 x 14 grid where the guidance model is as often unsure as sure.
BATCHES = {
    16: ("mean 8", "13"),
    32: ("mean 13", "26"),
    64: ("mean 20", "50"),
    128: ("mean 50", "99"),
    256: ("mean 99", "197", "policy"),
    LONG: ("257", "577"),
}
# Longest segment: blocks of queries and of keys that are worth a try, the keys whole or in a loop.
BLOCKS = {
    16: ((16,), (16,)),
    32: ((16, 32), (16, 32)),
    64: ((16, 32, 64), (32, 64)),
    128: ((32, 64, 128), (64, 128)),
    256: ((64, 128), (64, 128, 256)),
    LONG: ((64, 128), (32, 64, 128)),
}
# Rows of queries: the numbers of warps that are worth a try. A warpgroup's product takes 64 rows and 4 warps.
NUM_WARPS = {16: (1, 2, 4), 32: (1, 2, 4), 64: (2, 4, 8), 128: (4, 8)}
SAME = 0.02  # of an answer's norm: two roundings to bfloat16


class Problem(NamedTuple):
    """One entry of the tables."""

    dtype: torch.dtype
    head_dim: int
    has_bias: bool
    longest: int

    def shipped(self, lengths: Tensor) -> Tile:
        longest, mean = int(lengths.max()), int(lengths.sum()) // len(lengths)
        return tile_for(longest, longest, mean, self.head_dim, self.dtype == torch.float32, self.has_bias)

    def tiles(self) -> list[Tile]:
        """What is tried. float32 runs without tensor cores, and takes twice the registers for a tile."""
        found = []
        for block_query, block_key in itertools.product(*BLOCKS[self.longest]):
            stages = (2,) if block_key >= self.longest else (2, 3)  # one block of keys is no loop to pipeline
            if self.dtype != torch.float32 or max(block_query, block_key) <= 64:
                rest = itertools.product(NUM_WARPS[block_query], stages)
                found += [Tile(block_query, block_key, *options) for options in rest]
        return found


def lengths_of(problem: Problem, batch: str) -> Tensor:
    if batch == "policy":
        counts, _ = apply_law(torch.linspace(0, 1, BATCH), LEVELS, DropPolicy().law)
        return (counts[counts > 0] + 1).to(DEVICE)  # with the class token; what exits has no segment
    if batch.startswith("mean "):
        return ragged_lengths(int(batch.removeprefix("mean ")), BATCH, problem.longest)
    return torch.full((BATCH,), int(batch), dtype=torch.int32, device=DEVICE)


def argument_sets(problem: Problem, lengths: Tensor, rotate: bool) -> list[tuple]:
    """Arguments of the kernel's launch, as many as it takes to leave nothing in the cache."""
    cu_seqlens, longest, total = cu_seqlens_of(lengths), int(lengths.max()), int(lengths.sum())
    bias: tuple = (None, None, (0, 0))
    if problem.has_bias:
        table, *places = relative_bias(lengths, HEADS)
        bias = table.to(problem.dtype), *places

    def arguments() -> tuple:
        qkv = torch.randn(total, 3, HEADS, problem.head_dim, device=DEVICE).to(problem.dtype)
        return *qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest, None, *bias, 0

    first = arguments()
    return [first] + [arguments() for _ in range(num_argument_sets(4 * size_of(first[0])) - 1 if rotate else 0)]


@contextmanager
def tiled(tile: Tile) -> Iterator[None]:
    """The kernel's launches have this tile."""
    kernel.plan_launch.cache_clear()
    try:
        with mock.patch.object(kernel, "tile_for", lambda *_: tile):
            yield
    finally:
        kernel.plan_launch.cache_clear()


@functools.lru_cache(maxsize=1)
def one_of_each(problem: Problem) -> list[tuple]:
    return [argument_sets(problem, lengths_of(problem, batch), rotate=False)[0] for batch in BATCHES[problem.longest]]


def compiled(problem: Problem, tile: Tile) -> str:
    """Launch once on each batch, so that Triton's cache on disk holds every variant; why it fails, if it does."""
    try:
        with tiled(tile):
            for arguments in one_of_each(problem):
                kernel.launch(*arguments)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return ""


def times(problem: Problem, tiles: list[Tile], timer: Callable = graph_us) -> dict[Tile, list[float]]:
    """Microseconds of each tile on each batch; of the shipped one under the name of None."""
    found: dict = {None: [], **{tile: [] for tile in tiles}}
    for batch in BATCHES[problem.longest]:
        lengths = lengths_of(problem, batch)
        sets = argument_sets(problem, lengths, rotate=True)
        shipped = problem.shipped(lengths)
        calls = max(10, len(sets))
        with tiled(shipped):
            wanted = kernel.launch(*sets[0]).float()
            spin()
        for name, microseconds in found.items():
            with tiled(name or shipped):
                error = (kernel.launch(*sets[0]).float() - wanted).norm() / wanted.norm()
                is_same = error.item() <= SAME  # false for NaN
                microseconds.append(timer(Rotation(kernel.launch, sets), calls) if is_same else math.inf)
    return found


def written(tile: Tile) -> str:
    optional = tile._field_defaults
    options = [f"{name}={value}" for name, value in tile._asdict().items() if optional.get(name, value) != value]
    return f"Tile({', '.join([*map(str, tile[: len(tile) - len(optional)]), *options])})"


def entry(problem: Problem, found: dict) -> str:
    """A line of the table."""
    mean = {name: math.prod(microseconds) ** (1 / len(microseconds)) for name, microseconds in found.items()}
    best = min((tile for tile in found if tile), key=mean.__getitem__)
    longest = "LONG" if problem.longest == LONG else problem.longest
    shipped = " and ".join(
        dict.fromkeys(written(problem.shipped(lengths_of(problem, batch))) for batch in BATCHES[problem.longest])
    )
    batches = ", ".join(BATCHES[problem.longest])
    took = ["/".join(f"{us:.2f}" for us in found[name]) for name in (best, None)]
    gain = mean[None] / mean[best]
    return f"    {longest}: {written(best)},  # {took[0]} us at {batches}; shipped {shipped} {took[1]}, {gain:.2f} x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64])
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 1))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    problems = [Problem(dtype, *rest) for rest in itertools.product(args.head_dim, (False, True), BATCHES)]
    pairs = [(problem, tile) for problem in problems for tile in problem.tiles()]
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        failures = dict(zip(pairs, pool.map(compiled, *zip(*pairs, strict=True), chunksize=4), strict=True))
    lines: dict[str, list[str]] = {}
    for problem in problems:
        found = times(problem, [tile for tile in problem.tiles() if not failures[problem, tile]])
        print(problem)
        for tile in problem.tiles():
            result = failures[problem, tile] or "/".join(f"{us:.2f}" for us in found[tile]) + " us"
            print(f"    {written(tile)}: {result}", flush=True)
        table = f"FLOAT32_TILES[{problem.head_dim > 64}]" if dtype == torch.float32 else "HALF_TILES"
        key = "" if dtype == torch.float32 else f"[{problem.head_dim > 64}, {problem.has_bias}]"
        lines.setdefault(f"{table}{key}: head_dim {problem.head_dim}, {args.dtype}", []).append(entry(problem, found))
    for table, entries in lines.items():
        print(table, *entries, sep="\n")


if __name__ == "__main__":
    main()
