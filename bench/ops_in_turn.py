"""Every operator against plain PyTorch on a CPU, timed in turn as process time of one thread.

    OMP_NUM_THREADS=1 python bench/ops_in_turn.py [--dtype bfloat16] [--batches 1 8 64] [--compiled] > FILE.md

``make bench`` measures wall time, one implementation after the other. On a shared machine, only short turns of a few
milliseconds are comparable, so this script lets the implementations take turns. The rivals are those of
``bench/test_*.py``.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from measure import Case
from table import OPERATORS, markdown

TURN_SECONDS = 5e-3
LEAST_TURNS = 7


def calls_of(operator: str, case: Case) -> dict[str, Callable[[], Any]]:
    """Return our call and the rival's call on the arguments of the operator's benchmark."""
    found: dict[str, Callable[[], Any]] = {}

    def compare(name: str, own: Callable, eager: Callable, make_arguments: Callable, *_: Any, **__: Any) -> None:
        arguments = make_arguments()
        found.update(ours=lambda: own(*arguments), eager=lambda: eager(*arguments))

    torch.manual_seed(0)
    getattr(importlib.import_module(f"test_{operator}"), f"test_{operator}")(case, compare)
    return found


def timed(call: Callable[[], Any], calls: int) -> float:
    """Return the seconds of process time per call, over this number of calls."""
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls


def medians(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return each implementation's median over turns in microseconds. Turns go on for ``seconds`` of wall time."""
    for call in ways.values():
        timed(call, 3)
    calls = {name: max(1, int(TURN_SECONDS / timed(call, 3))) for name, call in ways.items()}
    turns: dict[str, list[float]] = {name: [] for name in ways}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(turns["ours"]) < LEAST_TURNS:
        for name, call in ways.items():
            turns[name].append(timed(call, calls[name]))
    return {name: 1e6 * statistics.median(times) for name, times in turns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--grids", nargs="+", type=int, default=[14, 24], help="patches per side of the grid")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="also time the rival under torch.compile")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per row")
    options = parser.parse_args()
    measure.DTYPE = getattr(torch, options.dtype)
    torch.set_num_threads(1)
    lines = [("operator", "batch", "grid", "ours, us", "eager, us", "x eager", *["x compiled"] * options.compiled)]
    with torch.inference_mode():
        for operator in options.operators:
            for batch in options.batches:
                for side in options.grids:
                    ways = calls_of(operator, Case("tinydrop", batch, (side, side), 0.5))
                    if options.compiled:
                        torch._dynamo.reset()
                        ways["compiled"] = torch.compile(ways["eager"], dynamic=False)
                    found = medians(ways, options.seconds)
                    ours, *rivals = found.values()
                    ratios = (f"{rival / ours:.2f}" for rival in rivals)
                    row = operator, str(batch), f"{side}x{side}", f"{ours:.0f}", f"{found['eager']:.0f}", *ratios
                    lines.append(row)
    kind = torch.backends.cpu.get_cpu_capability()
    print(f"{options.dtype}, {kind}, torch {torch.__version__}, process time of one thread, medians of turns.\n")
    print(markdown(lines))


if __name__ == "__main__":
    main()
