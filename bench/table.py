"""Tables of the figures of ``pytest bench --lines FILE``, and a last table with the targets.

    python bench/table.py FILE [FILE ...]

Attention on a GPU has its own table, with one row per shape and the ``us`` of each implementation in a column. A star
marks the implementation that the package selects. ``x best`` (speed-up over the best rival), ``copy``, ``warm`` (time
with the arguments in the cache) and ``host`` belong to the starred one. All other operators have one row per shape, for
the package's implementation, which is Triton on CUDA and plain PyTorch on CPU. The columns are:

* ``us``: microseconds per call. ``g`` is device time within a CUDA graph. ``e`` is device time between CUDA events, if
  the call cannot be captured. ``w`` is wall time until the call has ended;
* ``events``: microseconds of device time between CUDA events, with calls launched one by one;
* ``host``: microseconds of host time;
* ``x eager``, ``x compiled``: speed-up over the PyTorch baseline, by the first of these clocks that timed both;
* ``copy``: rate of the bytes that must move, as a fraction of the rate of a large copy in the same run;
* ``floor``: the larger of ``copy`` and the rate of the matrix products as a fraction of a large product's rate.

The targets are those of an H200. An H100 is compared with the same targets. Fractions of a copy's rate always refer to
a copy on the same card.
"""

import functools
import json
import operator
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

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
CLOCKS = {"device_us_graph": "g", "device_us_events": "e", "latency_us": "w"}  # the first measured clock is used
GRIDS = ("14x14", "24x24", "37x37")
RIVALS = ("varlen_attn", "cudnn", "fa3", "padded", "dense")
ATTENTION = ("triton", "cuda", *RIVALS)
CARDS = ("H200", "H100")
NOT_MEASURED = "not measured"

Row = dict[str, dict]  # implementation: its figures
Key = tuple[str, int, str, float]  # operator, batch, grid, fraction kept
Segments = tuple[int, str, bool]  # of attention: batch, lengths, True with a bias
Bar = tuple[str, str, str]  # a target, the measured value, "met" or "missed"


def load(paths: list[str]) -> tuple[dict[Key, Row], dict[Segments, Row]]:
    """Return the rows of all operators except attention on a GPU, and the rows of attention on a GPU."""
    rows: dict[Key, Row] = {}
    attention: dict[Segments, Row] = {}
    for line in chain.from_iterable(Path(path).read_text().splitlines(keepends=True) for path in paths):
        if not line.endswith("\n"):  # the process was killed while it wrote this line
            continue
        info = json.loads(line)
        if "lengths" in info:
            row = attention.setdefault((info["batch"], info["lengths"], info["bias"]), {})
        else:
            row = rows.setdefault((info["operator"], info["batch"], info["grid"], info["keep"]), {})
        row[info["implementation"]] = info
    return rows, attention


def clock_of(own: dict) -> str:
    return next(clock for clock in CLOCKS if clock in own)


def speed_up(row: Row, other: str, own: str = "tinydrop") -> float | None:
    """Return how many times longer another implementation takes than ``own``; None if no clock timed both."""
    if own not in row:
        return None
    clock = next((clock for clock in CLOCKS if clock in row[own] and clock in row.get(other, {})), None)
    return None if clock is None else row[other][clock] / row[own][clock]


def default(row: Row) -> dict:
    """Return the figures of the attention implementation that the package selects."""
    return next((info for info in row.values() if info["is_default"]), {})


def best_rival(row: Row) -> float | None:
    """Return how many times longer the fastest rival takes than the package; None if no rival was measured."""
    own = default(row).get("implementation", "")
    return min((ratio for rival in RIVALS if (ratio := speed_up(row, rival, own))), default=None)


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(lines: list[tuple[str, ...]]) -> str:
    head, *body = lines
    return "\n".join(f"|{'|'.join(line)}|" for line in (head, ("---",) * len(head), *body))


def attention_table(rows: dict[Segments, Row]) -> str:
    def time(info: dict) -> str:
        return f"{info[clock_of(info)]:.1f}{CLOCKS[clock_of(info)]}{'*' * info['is_default']}" if info else ""

    head = "batch", "lengths", "bias", *ATTENTION, "x best", "copy", "warm", "host", "host of varlen_attn"
    lines: list[tuple[str, ...]] = [head]
    for segments, row in rows.items():
        own = default(row)
        lines.append(
            (
                *(str(segments[0]), segments[1], "yes" if segments[2] else ""),
                *(time(row.get(name, {})) for name in ATTENTION),
                number(best_rival(row), ".2f"),
                number(own.get("fraction_of_copy"), ".2f"),
                number(own.get("device_us_warm"), ".1f"),
                number(own.get("host_us"), ".1f"),
                number(row.get("varlen_attn", {}).get("host_us"), ".1f"),
            )
        )
    return markdown(lines)


def table(rows: dict[Key, Row]) -> str:
    lines: list[tuple[str, ...]] = [COLUMNS]
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
    return markdown(lines)


def summary(rows: list[Row]) -> str:
    """Return the devices, versions and highest rates of a run in words."""
    infos = [info for row in rows for info in row.values()]
    parts = [", ".join(sorted({f"{i['device']}, torch {i['torch']}, {i['dtype']}" for i in infos}))]
    for name, label in (("copy_gb_per_s", "copy %.0f GB/s"), ("matrix_tflop_per_s", "matrix product %.3g TFLOP/s")):
        parts += sorted({label % i[name] for i in infos if name in i})
    clocks = [mhz for info in infos for mhz in info.get("clock_mhz", ()) if mhz]
    parts += [f"clock {min(clocks)} to {max(clocks)} MHz"] if clocks else []
    return "; ".join(parts)


def judge(bar: str, values: list[float | None], good: Callable[[float], bool], worst: Callable, note: str = "") -> Bar:
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return bar, NOT_MEASURED, ""
    value = worst(found)
    return bar, f"{value:.3g}{note}", "met" if good(value) else "missed"


def attention_bars(rows: dict[Segments, Row]) -> list[Bar]:
    """Return the targets of attention, for bfloat16, 16 heads of 64 and the implementation that the package selects."""

    def judged(*segments) -> Row:
        row = rows.get(segments, {})
        return row if is_judged(default(row)) else {}

    found = []
    over_rivals = {"mean 20": 1.5, "mean 50": 1.5, "mean 99": 1.5, "197": 1.15, "257": 1.15, "577": 1.0}
    for lengths, least in over_rivals.items():
        row = judged(256, lengths, False)
        missing = [rival for rival in RIVALS if rival not in row and (rival != "dense" or lengths.isdecimal())]
        note = f"; without {', '.join(missing)}" if missing else ""
        strongest_were_there = not {"fa3", "varlen_attn"} & set(missing)
        # Not measured without the strongest rivals, because their absence must not meet a target.
        factor = best_rival(row) if strongest_were_there else None
        bar = f"attention, batch 256, {lengths}: at least {least} times as fast as the best rival"
        found.append(judge(bar, [factor], functools.partial(operator.le, least), min, note))
    for lengths in ("mean 50", "mean 99", "197", "257"):
        fraction = default(judged(256, lengths, False)).get("fraction_of_copy")
        bar = f"attention, batch 256, {lengths}: at least 0.7 of the copy's rate"
        found.append(judge(bar, [fraction], lambda x: x >= 0.7, min))
    for lengths in ("mean 20", "mean 50", "mean 99", "197"):
        biased = default(judged(256, lengths, True))
        plain = judged(256, lengths, False).get(biased.get("implementation", ""), {})
        ratio = speed_up({"plain": plain, "biased": biased}, "biased", "plain")
        bar = f"attention, batch 256, {lengths}: with BEiT's bias at most 1.2 times as long"
        found.append(judge(bar, [ratio], lambda x: x <= 1.2, max))
    measured = [judged(*segments) for segments in rows if not segments[2]] or [{}]
    ratios = [
        default(row)["host_us"] / row["varlen_attn"]["host_us"] if "host_us" in row.get("varlen_attn", {}) else None
        for row in measured
    ]
    bar = "attention, every batch and length: at most varlen_attn's host time"
    return [*found, judge(bar, ratios, lambda x: x <= 1, max)]


def operator_bars(rows: dict[Key, Row]) -> list[Bar]:
    """Return the targets of all other operators, for Triton kernels in bfloat16."""

    def judged(key: Key) -> Row:
        row = rows.get(key, {})
        own = row.get("tinydrop", {})
        return row if is_judged(own) and own["backend"] == "triton" else {}

    def own(key: Key, name: str) -> float | None:
        return judged(key).get("tinydrop", {}).get(name)

    select = ("select_tokens", 256, "14x14", 0.5)
    name = "select_tokens, batch 256, 7x7x448 -> 14x14"
    device_time = own(select, "device_us_graph") or own(select, "device_us_events")
    found = [
        judge(f"{name}: at most 15 us of device time", [device_time], lambda us: us <= 15, max),
        judge(f"{name}: 10 times as fast as eager", [speed_up(judged(select), "eager")], lambda x: x >= 10, min),
        judge(f"{name}: 3 times as fast as compiled", [speed_up(judged(select), "compiled")], lambda x: x >= 3, min),
    ]
    for name in ("embed_tokens", "gather_tokens"):
        for grid in GRIDS:
            fractions = [own((name, 256, grid, keep), "fraction_of_floor") for keep in (0.25, 0.5, 1.0)]
            bar = f"{name}, batch 256, {grid}, keep 0.25 to 1: at least 0.75 of the copy's or the matrix product's rate"
            found.append(judge(bar, fractions, lambda fraction: fraction >= 0.75, min))
    for grid in GRIDS:
        host_time = own(("front_end", 1, grid, 0.5), "host_us")
        bar = f"front end, batch 1, {grid}: at most 60 us of host time, read-back included"
        found.append(judge(bar, [host_time], lambda us: us <= 60, max))
    return found


def is_judged(info: dict) -> bool:
    return any(card in info.get("device", "") for card in CARDS)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rows, attention = load(sys.argv[1:])
    parts = [attention_table(attention)] if attention else []
    parts += [table(rows)] if rows else []
    found = [*attention.values(), *rows.values()]
    cards = sorted({info["device"] for row in found for info in row.values()})
    head = f"targets for an H200, measured on {', '.join(cards) or 'nothing'}", "measured", ""
    print(*parts, summary(found), markdown([head, *attention_bars(attention), *operator_bars(rows)]), sep="\n\n")


if __name__ == "__main__":
    main()
