"""Search for the fastest tiles of attention's Triton kernel on the GPU of this machine.

    python bench/tune_attention.py [--dtype bfloat16] [--head-dim 64 ...] [--processes N]

The script covers each longest segment of the tables in ops/kernels/attention_tiles.py, with and without a bias. The
score of a tile is the geometric mean of its times on several batches of 256 in a CUDA graph. The batches have equal
lengths, ragged lengths, or the lengths that the default policy gives. The script prints every time, and then the tables
with the fastest tile beside the shipped one. Answers are compared with those of the shipped tile. One head_dim takes
about 6 minutes on 16 cores (calculated, not measured). Most of this time is compiling, which runs first in many
processes.
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
LEVELS = [(side, side) for side in (14, 12, 11, 9, 7)]  # all grids of a ViT at 224 pixels and patch 16
# Longest segment: the lengths of its batches. "mean 20" is ragged with this mean. "policy" has the lengths that the
# default policy gives on a 14 x 14 grid for evenly spread confidences.
BATCHES = {
    16: ("mean 8", "13"),
    32: ("mean 13", "26"),
    64: ("mean 20", "50"),
    128: ("mean 50", "99"),
    256: ("mean 99", "197", "policy"),
    LONG: ("257", "577"),
}
# Longest segment: block sizes of queries and of keys to try. Keys fit into one block or are looped over.
BLOCKS = {
    16: ((16,), (16,)),
    32: ((16, 32), (16, 32)),
    64: ((16, 32, 64), (32, 64)),
    128: ((32, 64, 128), (64, 128)),
    256: ((64, 128), (64, 128, 256)),
    LONG: ((64, 128), (32, 64, 128)),
}
# Rows of queries: numbers of warps to try. A warpgroup's product needs 64 rows and 4 warps.
NUM_WARPS = {16: (1, 2, 4), 32: (1, 2, 4), 64: (2, 4, 8), 128: (4, 8)}
SAME = 0.02  # allowed error as a fraction of an answer's norm, for two roundings to bfloat16


class Problem(NamedTuple):
    """One entry of the tile tables."""

    dtype: torch.dtype
    head_dim: int
    has_bias: bool
    longest: int

    def shipped(self, lengths: Tensor) -> Tile:
        longest, mean = int(lengths.max()), int(lengths.sum()) // len(lengths)
        return tile_for(longest, longest, mean, self.head_dim, self.dtype == torch.float32, self.has_bias)

    def tiles(self) -> list[Tile]:
        """Return the tiles to try. float32 gets small tiles only, because it needs twice the registers per tile."""
        found = []
        for block_query, block_key in itertools.product(*BLOCKS[self.longest]):
            stages = (2,) if block_key >= self.longest else (2, 3)  # one block of keys has no loop to pipeline
            if self.dtype != torch.float32 or max(block_query, block_key) <= 64:
                rest = itertools.product(NUM_WARPS[block_query], stages)
                found += [Tile(block_query, block_key, *options) for options in rest]
        return found


def lengths_of(problem: Problem, batch: str) -> Tensor:
    if batch == "policy":
        counts, _ = apply_law(torch.linspace(0, 1, BATCH), LEVELS, DropPolicy().law)
        return (counts[counts > 0] + 1).to(DEVICE)  # plus the class token; images that exit have no segment
    if batch.startswith("mean "):
        return ragged_lengths(int(batch.removeprefix("mean ")), BATCH, problem.longest)
    return torch.full((BATCH,), int(batch), dtype=torch.int32, device=DEVICE)


def argument_sets(problem: Problem, lengths: Tensor, rotate: bool) -> list[tuple]:
    """Return arguments of the kernel's launch. With ``rotate``, there are enough sets to exceed the cache."""
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
    """Make the kernel's launches use this tile within the ``with`` block."""
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
    """Compile every variant into Triton's disk cache by launching it. Return the error, or an empty string."""
    try:
        with tiled(tile):
            for arguments in one_of_each(problem):
                kernel.launch(*arguments)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return ""


def times(problem: Problem, tiles: list[Tile], timer: Callable = graph_us) -> dict[Tile, list[float]]:
    """Return the microseconds of each tile on each batch. The key None is the shipped tile."""
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
                is_same = error.item() <= SAME  # written so that NaN counts as different
                microseconds.append(timer(Rotation(kernel.launch, sets), calls) if is_same else math.inf)
    return found


def written(tile: Tile) -> str:
    optional = tile._field_defaults
    options = [f"{name}={value}" for name, value in tile._asdict().items() if optional.get(name, value) != value]
    return f"Tile({', '.join([*map(str, tile[: len(tile) - len(optional)]), *options])})"


def entry(problem: Problem, found: dict) -> str:
    """Return a line of the table."""
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
