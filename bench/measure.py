"""Measuring one call: its time on the device and on the host, against what the machine can do at most.

Times are in microseconds, rates in bytes or floating-point operations per second.
"""

import functools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydrop_kernels import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
REPEATS = 5  # of which the median is taken
SPIN_SECONDS = 0.2
LINES: Path | None = None  # where measure() appends its figures, pytest's --lines


@dataclass(frozen=True)
class Case:
    """What one benchmark runs."""

    implementation: str  # "tinydrop", "eager" or "compiled"
    batch: int
    grid: tuple[int, int]
    keep: float  # fraction of the patches kept

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def kept(self) -> int:
        """Patches kept of each image, rounded up as the package's policy does."""
        return math.ceil(self.keep * self.num_patches)

    @property
    def labels(self) -> dict[str, Any]:
        return {"batch": self.batch, "grid": f"{self.grid[0]}x{self.grid[1]}", "keep": self.keep}

    def __str__(self) -> str:
        return f"{self.implementation}-b{self.batch}-{self.grid[0]}x{self.grid[1]}-keep{self.keep:g}"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def kept_indices(case: Case) -> Tensor:
    """As select_tokens gives them: int32 ``(batch, T)``, ``kept`` random patches in raster order, then -1."""
    chosen = torch.rand(case.batch, case.num_patches, device=DEVICE).argsort(dim=1)[:, : case.kept]
    indices = torch.full((case.batch, case.num_patches), -1, dtype=torch.int32, device=DEVICE)
    indices[:, : case.kept] = chosen.sort(dim=1).values
    return indices


def ragged_lengths(mean: float, batch: int, longest: int) -> Tensor:
    """Lengths of a ragged batch, the same in every run: normal, of a third of the mean in deviation, from 1 up."""
    noise = torch.randn(batch, generator=torch.Generator().manual_seed(0))
    return (mean + mean / 3 * noise).round().clamp(1, longest).int().to(DEVICE)


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def relative_bias(lengths: Tensor, heads: int) -> ops.RelativeBias:
    """BEiT's, for segments of a class token and random patches of the smallest of ViT's grids that has enough."""
    longest = int(lengths.max())
    side = next(side for side in (14, 24, 37) if side**2 >= longest - 1)
    order = torch.rand(len(lengths), side**2, device=DEVICE).argsort(dim=1)
    chosen = torch.arange(side**2, device=DEVICE) < lengths[:, None] - 1
    patches = F.pad(order.where(chosen, side**2).sort(dim=1).values, (1, 0), value=-1)
    positions = patches[:, :longest][torch.arange(longest, device=DEVICE) < lengths[:, None]].int()
    return ops.RelativeBias(randn((2 * side - 1) ** 2 + 3, heads), positions, (side, side))


def size_of(*tensors: Tensor) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Rotation:
    """Call a function on one set of arguments after the other, holding as many results.

    With sets that together exceed the L2 cache, neither inputs nor outputs are found there from the call before.
    """

    def __init__(self, function: Callable, argument_sets: Sequence[tuple]):
        self.function, self.argument_sets = function, argument_sets
        self.results: list[Any] = [None] * len(argument_sets)
        self.turn = -1

    def __call__(self) -> None:
        self.turn = (self.turn + 1) % len(self.argument_sets)
        self.results[self.turn] = self.function(*self.argument_sets[self.turn])


def num_argument_sets(moved_bytes: int) -> int:
    """Three times the L2 cache's worth, but no more than 16: what fits many times over is bound by latency anyway."""
    if not CUDA:
        return 1
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return min(16, 1 + 3 * cache // moved_bytes)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


@functools.cache
def _spin_matrices() -> tuple[Tensor, Tensor, Tensor]:
    return randn(4096, 4096), randn(4096, 4096), randn(4096, 4096)


def spin() -> None:
    """Keep the device busy for a while: an idle GPU lowers its clocks, and takes its time to raise them again."""
    if not CUDA:
        return
    left, right, out = _spin_matrices()
    end = time.monotonic() + SPIN_SECONDS
    while time.monotonic() < end:
        for _ in range(10):
            torch.mm(left, right, out=out)
        synchronize()


def clock_mhz() -> int | None:
    """What the GPU's multiprocessors run at now; None where neither NVML nor nvidia-smi tells."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # of torch's own, where there is no pynvml, and of NVML's
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        uuid = f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
        try:
            return int(subprocess.run([*command, uuid], capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError, ValueError):
            return None


def wall_us(step: Callable, calls: int) -> float:
    """Time of a call on the host: nothing waits for the device between the calls."""
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        times.append(1e6 * (time.perf_counter() - start) / calls)
    synchronize()
    return statistics.median(times)


def device_us(step: Callable, calls: int, host_us: float) -> float:
    """Time of a call on the device, by CUDA events around many.

    The device sleeps until the host, which needs ``host_us`` for a call, has queued them all: else a call that is
    shorter than its launch would be timed at the launch's length.
    """
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2000 * 1.2 * host_us * calls))  # cycles, of which a GPU has at most about 2000 in 1 us
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def captured(step: Callable) -> Any:
    """A CUDA graph of a call.

    Where none can hold it, an error is raised, and nothing else should be measured in the process: torch's allocator
    still believes that a graph is being captured.
    """
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream())  # to which torch does not go back where capturing fails
    with here, torch.cuda.graph(graph):
        step()
    return graph


def graph_us(step: Callable, calls: int) -> float:
    """Time of a call on the device within a CUDA graph of ``calls`` calls."""

    def all_calls() -> None:
        for _ in range(calls):
            step()

    graph = captured(all_calls)
    graph.replay()
    torch.cuda.synchronize()
    return device_us(graph.replay, 3, host_us=200.0) / calls


@functools.cache
def copy_rate() -> float:
    """Bytes read plus bytes written per second by a copy that is larger than any cache."""
    source = torch.randint(256, (2**30 if CUDA else 2**27,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size_of(source) / (1e-6 * _plain_us(lambda: target.copy_(source)))


@functools.cache
def matrix_rate() -> float:
    """Floating-point operations per second of a large matrix product in ``DTYPE``, on random data."""
    size = 8192 if CUDA else 1024
    left, right = randn(size, size), randn(size, size)
    return 2 * size**3 / (1e-6 * _plain_us(lambda: left @ right))


def _plain_us(step: Callable) -> float:
    for _ in range(3):
        step()
    return device_us(step, 10, host_us=20.0) if CUDA else wall_us(step, 3)


def measure(
    benchmark: Any,
    operator: str,
    implementation: str,
    backend: str,
    labels: dict[str, Any],
    function: Callable,
    make_arguments: Callable[[], tuple],
    moved_bytes: int,
    flops: int = 0,
    reads_back: bool = False,
) -> None:
    """Time ``function(*make_arguments())``, add the figures to ``benchmark.extra_info`` and append them to ``LINES``.

    ``latency_us`` is of a call and the wait for its end. All figures are of arguments that no cache holds, except
    ``device_us_warm``: there a call finds its own from the one before, as attention finds what the projection has just
    written. Where no CUDA graph can hold the call, the process ends behind its figures.

    Args:
        backend: what runs in the end: "torch", "reference", "triton", "cuda".
        labels: what else tells this call from others of its operator; "batch" above all.
        moved_bytes: the fewest that the operator, not this implementation of it, can read and write.
        flops: of matrix products that the operator cannot do without.
        reads_back: the function waits for the device, which a CUDA graph cannot.
    """
    argument_sets = [make_arguments() for _ in range(num_argument_sets(moved_bytes))]
    step = Rotation(function, argument_sets)
    for _ in range(3 + len(argument_sets)):  # compiles, lets cuDNN choose, and takes the memory of all results
        step()
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    estimate = 1e6 * (time.perf_counter() - start)

    info: dict[str, Any] = {
        "operator": operator,
        "implementation": implementation,
        "backend": backend,
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "torch": torch.__version__,
        "dtype": str(DTYPE).removeprefix("torch."),
        **labels,
        "bytes": moved_bytes,
        "flops": flops,
        "argument_sets": len(argument_sets),
    }
    rounds = int(min(50, max(5, 3e5 / estimate)))
    benchmark.group = " ".join((operator, *(f"{name} {value}" for name, value in labels.items())))

    def until_its_end() -> None:
        step()
        synchronize()

    if CUDA:
        spin()
        info["clock_mhz"] = [clock_mhz()]  # before and after
    benchmark.pedantic(until_its_end, rounds=rounds)
    if benchmark.stats:  # None under --benchmark-disable
        info["latency_us"] = 1e6 * benchmark.stats.stats.median
    if CUDA:
        calls = int(min(30, max(4, 2e4 / estimate)))  # a GPU queues about 1000 launches
        info["host_us"] = wall_us(step, calls)
        # The reference waits for the device in most operators, so that no graph can hold it.
        graphable = not reads_back and backend != "reference"
        if not reads_back:
            info["device_us_events"] = device_us(step, calls, info["host_us"])
        if graphable:
            try:
                info["device_us_graph"] = graph_us(Rotation(function, argument_sets), max(calls, len(argument_sets)))
                info["device_us_warm"] = graph_us(Rotation(function, argument_sets[:1]), calls)
            except RuntimeError as error:
                info["graph_error"] = str(error).split("\n")[0]
        info["clock_mhz"].append(clock_mhz())
    best = info.get("device_us_graph") or info.get("device_us_events") or (None if CUDA else info.get("latency_us"))
    if best:
        rate, copy = moved_bytes / (1e-6 * best), copy_rate()
        info |= {"gb_per_s": rate / 1e9, "copy_gb_per_s": copy / 1e9, "fraction_of_copy": rate / copy}
        if flops:
            # The floor is the longer of moving the bytes and doing the arithmetic; this is how close the call comes.
            product = matrix_rate()
            info |= {"matrix_tflop_per_s": product / 1e12, "fraction_of_matrix": flops / (1e-6 * best) / product}
        info["fraction_of_floor"] = max(info["fraction_of_copy"], info.get("fraction_of_matrix", 0.0))
    benchmark.extra_info.update(info)
    if LINES:
        with LINES.open("a") as file:
            file.write(json.dumps(benchmark.extra_info) + "\n")
    if "graph_error" in info:
        import pytest  # only here: whole models are measured without it

        pytest.exit(f"no CUDA graph holds {benchmark.group}: {info['graph_error']}", returncode=1)
