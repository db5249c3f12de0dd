"""Shapes, implementations and fixtures of the operators' benchmarks.

pytest bench --lines FILE [--full] [--compiled all|some|none|alone] [--deadline SECONDS]
"""

import time
from pathlib import Path
from typing import Any

import measure as measuring
import pytest
import torch
from measure import CUDA, DEVICE, Case, measure

from tinydrop_kernels import ops

GRIDS = ((14, 14), (24, 24), (37, 37))  # 224 and 384 pixels at patch 16, 518 pixels at patch 14
BATCHES = (1, 256, 8, 64, 1024)  # those with targets come first, because a deadline may skip the last ones
STARTED = time.monotonic()


def pytest_addoption(parser):
    group = parser.getgroup("tinydrop")
    group.addoption("--full", action="store_true", help="measure all shapes on CPU too")
    group.addoption(
        "--compiled",
        choices=("all", "some", "none", "alone"),
        default="some" if CUDA else "none",
        help='shapes at which the baselines are also timed under torch.compile: "all"; "some", which is grid 14x14 and '
        'batch 256 (default on CUDA); "none"; "alone", which is "some" without any other implementation',
    )
    group.addoption("--lines", type=Path, help="append one line of JSON per case to this file")
    group.addoption("--deadline", type=float, help="skip cases that have not begun after this many seconds")


def pytest_configure(config):
    measuring.LINES = config.getoption("--lines")


def cases(operator: str, full: bool, compiled: str) -> list[Case]:
    """Return the cases of an operator.

    The fraction kept varies only at batch 256, and only for operators whose work depends on it.
    """
    batches, grids = (BATCHES, GRIDS) if CUDA or full else ((1, 8), GRIDS[:2])
    found = []
    for batch in batches:
        for grid in grids:
            keeps = (0.25, 0.5, 1.0) if batch == 256 and operator in ("embed_tokens", "gather_tokens") else (0.5,)
            for keep in keeps:
                if compiled != "alone":
                    found += [Case(name, batch, grid, keep) for name in ("tinydrop", "eager")]
                is_some = grid == GRIDS[0] or (batch == 256 and keep == 0.5)
                if compiled == "all" or (compiled in ("some", "alone") and is_some):
                    found.append(Case("compiled", batch, grid, keep))
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        operator = metafunc.function.__name__.removeprefix("test_")
        config = metafunc.config
        found = cases(operator, config.getoption("--full"), config.getoption("--compiled"))
        metafunc.parametrize("case", found, ids=str)


def pytest_collection_modifyitems(items):
    """Sort the cases by batch size, so that a deadline skips the last shapes of every operator.

    Compiled cases come last, because compiling takes longer than all other cases together.
    """

    def place(item) -> tuple[bool, int]:
        params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
        case = params.get("case") or params.get("run")  # "run" is the parameter of the attention benchmark on a GPU
        if case is None:
            return False, -1
        return case.implementation == "compiled", BATCHES.index(case.batch)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def before_the_deadline(request):
    deadline = request.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - STARTED > deadline:
        pytest.skip(f"not measured: the deadline of {deadline:g} s has passed")


@pytest.fixture(autouse=True)
def settings():
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # so that the baselines get cuDNN's fastest convolution
    with torch.inference_mode():
        yield
    if CUDA:
        torch.cuda.empty_cache()  # the largest batches take gigabytes


def assert_same_rows(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Check that packed rows of equally long segments equal the rows of a dense batch."""
    tolerance = 1e-4 if ours.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(ours.view(theirs.shape), theirs, atol=tolerance, rtol=tolerance)


@pytest.fixture
def compare(benchmark, case):
    """Time the case's implementation of an operator, and check that the package's and the user's answers agree."""

    def run(operator, own, eager, make_arguments, moved_bytes, flops=0, agree=assert_same_rows, reads_back=False):
        function = own if case.implementation == "tinydrop" else eager
        if case.implementation == "compiled":
            torch._dynamo.reset()  # compile for this shape alone, as for a user with a single shape
            function = torch.compile(eager, dynamic=False, fullgraph=True)
        backend = ops.OPERATORS["pack"].on(DEVICE.type)[0].name if case.implementation == "tinydrop" else "torch"
        call = (operator, case.implementation, backend, case.labels, function, make_arguments)
        measure(benchmark, *call, moved_bytes, flops, reads_back)
        if case.implementation == "tinydrop":
            arguments = make_arguments()
            agree(own(*arguments), eager(*arguments))

    return run
