"""Tests of the benchmarks' GPU code on a CPU with a fake ``torch.cuda``."""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import measure
import rivals
import table
import turns


class Event:
    """A CUDA event of a device that finishes all work at once."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Graph:
    """A CUDA graph whose replay takes no time."""

    def replay(self):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """Replace the parts of ``torch.cuda`` that bench/ uses, and fix the highest rates.

    Captures fail if ``refuses`` is set.
    """
    found = SimpleNamespace(refuses=False, streams=["the caller's"], slept=0)

    @contextmanager
    def stream(name):
        found.streams.append(name)
        try:
            yield
        finally:  # also drops streams entered since then, as torch does
            del found.streams[1:]

    @contextmanager
    def graph(_):
        found.streams.append("the graph's")
        yield
        if found.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        found.streams.pop()

    def sleep(cycles):
        found.slept += cycles

    stand_ins = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "stream": stream,
        "current_stream": lambda: "the caller's",
        "synchronize": lambda: None,
        "_sleep": sleep,
        "clock_rate": lambda: 1980,
        "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50 * 2**20),
        "memory_allocated": lambda: 10,
        "max_memory_allocated": lambda: 30,
        "reset_peak_memory_stats": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for module in (measure, turns):
        monkeypatch.setattr(module, "CUDA", True)
    monkeypatch.setattr(measure, "copy_rate", lambda: 3e12)
    monkeypatch.setattr(measure, "matrix_rate", lambda: 8e14)
    monkeypatch.setattr(measure, "SPIN_SECONDS", 0.0)
    monkeypatch.setattr(measure, "_spin_matrices", lambda: torch.ones(3, 2, 2).unbind())
    return found


class Benchmark:
    """A stand-in for pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.stats = {"is_default": True}, None

    def pedantic(self, function, rounds):
        for _ in range(rounds):
            function()
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=20e-6))


def measured(monkeypatch, tmp_path, **options):
    """Measure adding one to a thousand numbers, and return the figures in the file."""
    monkeypatch.setattr(measure, "LINES", tmp_path / "figures.jsonl")
    labels = {"batch": 256, "lengths": "mean 50", "bias": False}
    call = ("varlen_attention", "triton", "triton", labels, torch.add, lambda: (torch.zeros(1000), 1), 8000)
    try:
        measure.measure(Benchmark(), *call, **options)
    finally:
        (line,) = (tmp_path / "figures.jsonl").read_text().splitlines()
    return json.loads(line)


def test_every_figure_of_a_call_is_taken(gpu, monkeypatch, tmp_path):
    info = measured(monkeypatch, tmp_path, flops=2000)
    assert info["latency_us"] == pytest.approx(20) and info["host_us"] > 0
    assert info["device_us_events"] > 0 and gpu.slept > 0, "the device sleeps while the host queues its calls"
    assert info["device_us_graph"] > 0 and info["device_us_warm"] > 0 and gpu.streams == ["the caller's"]
    assert info["fraction_of_copy"] == pytest.approx(8000 / (1e-6 * info["device_us_graph"]) / 3e12)
    assert info["clock_mhz"] == [1980, 1980] and info["argument_sets"] == 16
    _, attention = table.load([tmp_path / "figures.jsonl"])
    assert attention == {(256, "mean 50", False): {"triton": info}}
    assert "targets for an H200, measured on NVIDIA H100" in shown(monkeypatch, tmp_path)


def shown(monkeypatch, tmp_path):
    """Return the output of bench/table.py."""
    printed: list[str] = []
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "figures.jsonl")])
    monkeypatch.setattr(table, "print", lambda *parts, **_: printed.extend(parts), raising=False)
    table.main()
    return "\n".join(printed)


def test_what_waits_for_the_device_has_no_device_time(gpu, monkeypatch, tmp_path):
    info = measured(monkeypatch, tmp_path, reads_back=True)
    assert {name for name in info if name.startswith("device_us")} == set() and "fraction_of_copy" not in info


def test_a_capture_that_fails_ends_the_process_behind_its_figures(gpu, monkeypatch, tmp_path):
    gpu.refuses = True
    with pytest.raises(pytest.exit.Exception, match="no CUDA graph holds .*: operation not permitted"):
        measured(monkeypatch, tmp_path)
    info = json.loads((tmp_path / "figures.jsonl").read_text())
    assert info["graph_error"].startswith("operation not permitted") and info["device_us_events"] > 0
    assert gpu.streams == ["the caller's"]


def test_whole_models_take_turns(gpu, monkeypatch):
    """Each round has calls with and without waiting. Launches and profiles follow the last round."""
    calls: list[str] = []
    monkeypatch.setattr(turns, "profiled", lambda call: (call(), calls.append("profiled")) and [("kernel", 3, 7.0)])
    ways = [
        turns.Way(name, lambda images, name=name: calls.append(name), [0, 1], 4, flops=lambda: 10)
        for name in ("dense", "ours")
    ]
    clocks = list(turns.take_turns(ways, 2, time.perf_counter, lambda: False, ["ours"]))
    assert clocks == [[1980, 1980]] * 3
    assert calls[-4:] == ["dense", "profiled", "ours", "profiled"] and calls.count("profiled") == 2
    found = turns.figures(ways[1], ways[:1], 60)
    assert found["launches"] == 3 and found["profile"] == [("kernel", 3, 7.0)] and found["gb"] == 20e-9
    assert found["calls"] == 4 and found["host_ms"] >= 0 and ways[0].profile is None


def test_a_dense_model_in_a_graph(gpu, monkeypatch):
    graphed = rivals.Graphed(lambda images: images + 1)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=graphed._run))
    assert graphed(torch.zeros(2)).tolist() == [1, 1] and graphed(torch.ones(2)).tolist() == [2, 2]


def test_tiles_are_tried(gpu, monkeypatch):
    """Tiles are tried on the kernel in the interpreter. A tile with wrong answers gets an infinite time."""
    pytest.importorskip("triton")
    import tune_attention

    from tinydrop_kernels.ops.kernels.attention_tiles import Tile

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(tune_attention, "BATCH", 2)
    monkeypatch.setattr(tune_attention, "HEADS", 1)
    problem = tune_attention.Problem(torch.float32, 16, False, 16)
    assert Tile(16, 16, 1) in problem.tiles()
    found = tune_attention.times(problem, [Tile(16, 16, 1)], lambda step, calls: (step(), 2.0)[1])
    assert found == {None: [2.0, 2.0], Tile(16, 16, 1): [2.0, 2.0]}
    line = tune_attention.entry(problem, found)
    assert line.startswith("    16: Tile(16, 16, 1),  # 2.00/2.00 us at mean 8, 13; shipped Tile(16, 16,")
