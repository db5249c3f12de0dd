"""Timing of one call on the device and on the host, compared with the machine's highest rates.

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
REPEATS = 5  # times are medians over this number of repeats
SPIN_SECONDS = 0.2
LINES: Path | None = None  # file to which measure() appends its figures; pytest's --lines


@dataclass(frozen=True)
class Case:
    """The implementation and the shape of one benchmark."""

    implementation: str  # "tinydrop", "eager" or "compiled"
    batch: int
    grid: tuple[int, int]
    keep: float  # fraction of the patches kept

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def kept(self) -> int:
        """Kept patches per image, rounded up as the package's policy does."""
        return math.ceil(self.keep * self.num_patches)

    @property
    def labels(self) -> dict[str, Any]:
        return {"batch": self.batch, "grid": f"{self.grid[0]}x{self.grid[1]}", "keep": self.keep}

    def __str__(self) -> str:
        return f"{self.implementation}-b{self.batch}-{self.grid[0]}x{self.grid[1]}-keep{self.keep:g}"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def kept_indices(case: Case) -> Tensor:
    """Return indices as select_tokens does: int32 ``(batch, T)``, ``kept`` random patches in raster order, then -1."""
    chosen = torch.rand(case.batch, case.num_patches, device=DEVICE).argsort(dim=1)[:, : case.kept]
    indices = torch.full((case.batch, case.num_patches), -1, dtype=torch.int32, device=DEVICE)
    indices[:, : case.kept] = chosen.sort(dim=1).values
    return indices


def ragged_lengths(mean: float, batch: int, longest: int) -> Tensor:
    """Return the lengths of a ragged batch, the same in every run.

    They are normally distributed, with a standard deviation of a third of the mean, and are at least 1.
    """
    noise = torch.randn(batch, generator=torch.Generator().manual_seed(0))
    return (mean + mean / 3 * noise).round().clamp(1, longest).int().to(DEVICE)


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def relative_bias(lengths: Tensor, heads: int) -> ops.RelativeBias:
    """Return BEiT's bias for segments of a class token and random patches.

    The grid is the smallest of 14 x 14, 24 x 24 and 37 x 37 that has enough patches.
    """
    longest = int(lengths.max())
    side = next(side for side in (14, 24, 37) if side**2 >= longest - 1)
    order = torch.rand(len(lengths), side**2, device=DEVICE).argsort(dim=1)
    chosen = torch.arange(side**2, device=DEVICE) < lengths[:, None] - 1
    patches = F.pad(order.where(chosen, side**2).sort(dim=1).values, (1, 0), value=-1)
    positions = patches[:, :longest][torch.arange(longest, device=DEVICE) < lengths[:, None]].int()
    return ops.RelativeBias(randn((2 * side - 1) ** 2 + 3, heads), positions, (side, side))


def size_of(*tensors: Tensor) -> int:
    """Return the bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Rotation:
    """A callable that runs a function on each of several argument sets in turn, and keeps the result of each.

    If the sets together exceed the L2 cache, no call finds its inputs or outputs in the cache.
    """

    def __init__(self, function: Callable, argument_sets: Sequence[tuple]):
        self.function, self.argument_sets = function, argument_sets
        self.results: list[Any] = [None] * len(argument_sets)
        self.turn = -1

    def __call__(self) -> None:
        self.turn = (self.turn + 1) % len(self.argument_sets)
        self.results[self.turn] = self.function(*self.argument_sets[self.turn])


def num_argument_sets(moved_bytes: int) -> int:
    """Return the number of argument sets that exceed the L2 cache three times, at most 16.

    Smaller calls fit into the cache many times and are bound by latency, so more sets would change nothing.
    """
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
    """Keep the device busy for ``SPIN_SECONDS``, because an idle GPU lowers its clocks and raises them slowly."""
    if not CUDA:
        return
    left, right, out = _spin_matrices()
    end = time.monotonic() + SPIN_SECONDS
    while time.monotonic() < end:
        for _ in range(10):
            torch.mm(left, right, out=out)
        synchronize()


def clock_mhz() -> int | None:
    """Return the current clock of the GPU's multiprocessors; None if neither NVML nor nvidia-smi reports it."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # torch raises if pynvml is missing, and NVML has errors of its own
        command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        uuid = f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
        try:
            return int(subprocess.run([*command, uuid], capture_output=True, text=True, check=True).stdout)
        except (OSError, subprocess.CalledProcessError, ValueError):
            return None


def wall_us(step: Callable, calls: int) -> float:
    """Return the host time of a call. The host does not wait for the device between calls."""
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
    """Return the device time of a call, measured with CUDA events around ``calls`` calls.

    The device sleeps until the host has queued all calls, which takes ``host_us`` per call. Otherwise a call that is
    shorter than its launch would be timed as long as the launch.
    """
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2000 * 1.2 * host_us * calls))  # in cycles; a GPU runs at most about 2000 cycles per us
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def captured(step: Callable) -> Any:
    """Return a CUDA graph of a call.

    If the call cannot be captured, an error is raised. Nothing else should be measured in the process afterwards,
    because torch's allocator stays in capture mode.
    """
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(torch.cuda.current_stream())  # restores the stream, which a failed capture does not
    with here, torch.cuda.graph(graph):
        step()
    return graph


def graph_us(step: Callable, calls: int) -> float:
    """Return the device time of a call within a CUDA graph of ``calls`` calls."""

    def all_calls() -> None:
        for _ in range(calls):
            step()

    graph = captured(all_calls)
    graph.replay()
    torch.cuda.synchronize()
    return device_us(graph.replay, 3, host_us=200.0) / calls


@functools.cache
def copy_rate() -> float:
    """Return the bytes read plus bytes written per second of a copy that is larger than any cache."""
    source = torch.randint(256, (2**30 if CUDA else 2**27,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size_of(source) / (1e-6 * _plain_us(lambda: target.copy_(source)))


@functools.cache
def matrix_rate() -> float:
    """Return the floating-point operations per second of a large matrix product in ``DTYPE`` on random data."""
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

    ``latency_us`` is the time of a call and the wait for its end. Arguments are not in any cache, except for
    ``device_us_warm``, where each call uses the arguments of the last one. This is the case of attention, which reads
    what the projection has just written. If the call cannot be captured in a CUDA graph, its figures are written and
    the process ends.

    Args:
        backend: the implementation that runs: "torch", "reference", "triton" or "cuda".
        labels: names and values that identify this call among those of its operator, such as "batch".
        moved_bytes: the fewest bytes that any implementation of the operator must read and write.
        flops: FLOPs of the matrix products that any implementation needs.
        reads_back: True if the function waits for the device, which a CUDA graph cannot contain.
    """
    argument_sets = [make_arguments() for _ in range(num_argument_sets(moved_bytes))]
    step = Rotation(function, argument_sets)
    for _ in range(3 + len(argument_sets)):  # compiles, lets cuDNN choose, and allocates all results
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
        info["clock_mhz"] = [clock_mhz()]  # a second value follows at the end
    benchmark.pedantic(until_its_end, rounds=rounds)
    if benchmark.stats:  # None under --benchmark-disable
        info["latency_us"] = 1e6 * benchmark.stats.stats.median
    if CUDA:
        calls = int(min(30, max(4, 2e4 / estimate)))  # few enough for the launch queue, which holds about 1000
        info["host_us"] = wall_us(step, calls)
        # The reference waits for the device in most operators, so it cannot be captured.
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
            # A call takes at least the time to move its bytes, and at least the time of its matrix products.
            # fraction_of_floor is the larger of these two times over the measured time.
            product = matrix_rate()
            info |= {"matrix_tflop_per_s": product / 1e12, "fraction_of_matrix": flops / (1e-6 * best) / product}
        info["fraction_of_floor"] = max(info["fraction_of_copy"], info.get("fraction_of_matrix", 0.0))
    benchmark.extra_info.update(info)
    if LINES:
        with LINES.open("a") as file:
            file.write(json.dumps(benchmark.extra_info) + "\n")
    if "graph_error" in info:
        import pytest  # imported here, because measuring whole models must not need pytest

        pytest.exit(f"no CUDA graph holds {benchmark.group}: {info['graph_error']}", returncode=1)
