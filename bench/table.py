"""A short table, and the bars, from pytest-benchmark's JSON.

    python bench/table.py FILE [FILE ...]

One row for each operator and shape, for the package's own implementation (Triton on CUDA, plain PyTorch on CPU):

* ``us``: microseconds of a call; on CUDA of device time within a CUDA graph (``g``) or, where none can hold the call,
  between CUDA events (``e``); else of wall clock until the call has ended (``w``);
* ``events``: microseconds of device time between CUDA events, launched one by one;
* ``host``: microseconds of host time;
* ``x eager``, ``x compiled``: how many times longer the PyTorch baseline takes, by the same clock as ``us``;
* ``copy``: the bytes that must move over ``us``, as a fraction of what a large copy moves in the same run;
* ``floor``: the same, or the matrix products' rate as a fraction of a large product's where that is more.
"""

import json
import sys
from collections.abc import Callable

OPERATORS = ("select_tokens", "pack", "embed_tokens", "gather_tokens", "segment_pool", "varlen_attention", "front_end")
COLUMNS = (
    "operator",
    "batch",
    "grid",
    "keep",
    "runs",
    "us",
    "events",
    "host",
    "x eager",
    "x compiled",
    "copy",
    "floor",
)
CLOCKS = {"device_us_graph": "g", "device_us_events": "e", "latency_us": "w"}  # the first that was measured counts
GRIDS = ("14x14", "24x24", "37x37")

Row = dict[str, dict]  # implementation: what was measured
Key = tuple[str, int, str, float]  # operator, batch, grid, fraction kept


def load(paths: list[str]) -> dict[Key, Row]:
    rows: dict[Key, Row] = {}
    for path in paths:
        with open(path) as file:
            benchmarks = json.load(file)["benchmarks"]
        for benchmark in benchmarks:
            info = benchmark["extra_info"] | {"latency_us": 1e6 * benchmark["stats"]["median"]}
            key = info["operator"], info["batch"], info["grid"], info["keep"]
            rows.setdefault(key, {})[info["implementation"]] = info
    return rows


def clock_of(own: dict) -> str:
    return next(clock for clock in CLOCKS if clock in own)


def speed_up(row: Row, other: str) -> float | None:
    """How many times longer another implementation takes than the package's, if both were measured alike."""
    if "tinydrop" not in row:
        return None
    clock = clock_of(row["tinydrop"])
    return row[other][clock] / row["tinydrop"][clock] if clock in row.get(other, {}) else None


def table(rows: dict[Key, Row]) -> str:
    """Markdown."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for key in sorted(rows, key=lambda key: (OPERATORS.index(key[0]), *key[1:])):
        own = rows[key].get("tinydrop")
        if own is None:
            continue
        clock = clock_of(own)
        lines.append(
            (
                *(key[0], str(key[1]), key[2], f"{key[3]:g}", own["backend"]),
                f"{own[clock]:.1f}{CLOCKS[clock]}",
                number(own.get("device_us_events"), ".1f"),
                number(own.get("host_us"), ".1f"),
                number(speed_up(rows[key], "eager"), ".1f"),
                number(speed_up(rows[key], "compiled"), ".1f"),
                number(own.get("fraction_of_copy"), ".2f"),
                number(own.get("fraction_of_floor"), ".2f"),
            )
        )
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def summary(rows: dict[Key, Row]) -> str:
    """What was measured on, and the ceilings."""
    infos = [info for row in rows.values() for info in row.values()]
    parts = [", ".join(sorted({f"{i['device']}, torch {i['torch']}, {i['dtype']}" for i in infos}))]
    for name, label in (("copy_gb_per_s", "copy %.0f GB/s"), ("matrix_tflop_per_s", "matrix product %.3g TFLOP/s")):
        parts += sorted({label % i[name] for i in infos if name in i})
    return "; ".join(parts)


def bars(rows: dict[Key, Row]) -> list[str]:
    """The figures that an H200 is asked for; all of them are of Triton kernels in bfloat16."""

    def judge(bar: str, values: list[float | None], good: Callable[[float], bool], worst: Callable) -> str:
        if None in values:
            return f"{bar}: not measured"
        value = worst(values)
        return f"{bar}: {'met' if good(value) else 'missed'} ({value:.3g})"

    def on_h200(key: Key) -> Row:
        row = rows.get(key, {})
        own = row.get("tinydrop", {})
        return row if "H200" in own.get("device", "") and own["backend"] == "triton" else {}

    def own(key: Key, name: str) -> float | None:
        return on_h200(key).get("tinydrop", {}).get(name)

    select = ("select_tokens", 256, "14x14", 0.5)
    name = "select_tokens, batch 256, 7x7x448 -> 14x14"
    device_time = own(select, "device_us_graph") or own(select, "device_us_events")
    lines = [
        judge(f"{name}: at most 15 us of device time", [device_time], lambda us: us <= 15, max),
        judge(f"{name}: 10 times over eager", [speed_up(on_h200(select), "eager")], lambda x: x >= 10, min),
        judge(f"{name}: 3 times over compiled", [speed_up(on_h200(select), "compiled")], lambda x: x >= 3, min),
    ]
    for operator in ("embed_tokens", "gather_tokens"):
        for grid in GRIDS:
            fractions = [own((operator, 256, grid, keep), "fraction_of_floor") for keep in (0.25, 0.5, 1.0)]
            bar = f"{operator}, batch 256, {grid}, keep 0.25 to 1: 0.75 of the copy's or the matrix product's rate"
            lines.append(judge(bar, fractions, lambda fraction: fraction >= 0.75, min))
    for grid in GRIDS:
        host_time = own(("front_end", 1, grid, 0.5), "host_us")
        bar = f"front end, batch 1, {grid}: at most 60 us on the host, its read-back included"
        lines.append(judge(bar, [host_time], lambda us: us <= 60, max))
    return lines


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rows = load(sys.argv[1:])
    print(table(rows), summary(rows), "\n".join(f"* {line}" for line in bars(rows)), sep="\n\n")


if __name__ == "__main__":
    main()
