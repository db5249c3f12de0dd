"""Tables and plots of the figures of bench/end_to_end.py.

The columns are:

* ``images/s``: images per second, on a GPU for calls that follow each other without waiting;
* ``p50 ms``, ``p99 ms``: milliseconds of a call until its end, as median and 99th percentile over all calls (with
  fewer than a hundred calls, the longest);
* ``exit ms``: median of the calls with an image that exits, at batch 1;
* ``x FLOPs``: dense FLOPs over the way's FLOPs, an upper bound on the speed-up;
* ``x dense``: speed-up over the faster of dense and dense-compiled, as median over the rounds;
* ``of ideal``: ``x dense`` over ``x FLOPs``;
* ``GB``, ``host ms``, ``launches``: on a GPU, peak memory beyond weights and images, host time and launches per call.

A way in **bold** is faster than ``ours`` at equal FLOPs. Both are eager.
"""

from pathlib import Path
from typing import Any

AT_EQUAL_FLOPS = ("tome", "padded", "resolution")
COLUMNS = {
    "images/s": ("images_per_s", ".1f"),
    "p50 ms": ("p50_ms", ".2f"),
    "p99 ms": ("p99_ms", ".2f"),
    "exit ms": ("exit_ms", ".2f"),
    "x FLOPs": ("flops_ratio", ".2f"),
    "x dense": ("speed_up", ".2f"),
    "of ideal": ("of_ideal", ".2f"),
    "GB": ("gb", ".2f"),
    "host ms": ("host_ms", ".2f"),
    "launches": ("launches", "d"),
}
HEAD = ("FLOPs", "batch", "way", *COLUMNS)

Row = dict[str, Any]


def beats_ours(row: Row, rows: list[Row]) -> bool:
    """Return True if the row is a rival at equal FLOPs that is faster than ours in the same case."""
    if row["way"] not in AT_EQUAL_FLOPS or "why_not" in row:
        return False
    case = ("model", "batch", "percent")
    ours = (own for own in rows if own["way"] == "ours" and all(own[name] == row[name] for name in case))
    return any(row["images_per_s"] > own["images_per_s"] for own in ours if "why_not" not in own)


def _cells(row: Row, rows: list[Row]) -> list[str]:
    mark = "**" if beats_ours(row, rows) else ""
    head = [f"{row['percent']} %", str(row["batch"]), f"{mark}{row['way']}{mark}"]
    if "why_not" in row:
        return [*head, f"not measured: {row['why_not']}", *[""] * (len(COLUMNS) - 1)]
    values = ((row.get(name), form) for name, form in COLUMNS.values())
    return head + ["" if value is None else format(value, form) for value, form in values]


def _table(lines: list[list[str]]) -> str:
    head, *body = lines
    return "\n".join(f"|{'|'.join(line)}|" for line in (head, ["---"] * len(head), *body))


def _profile_table(row: Row, longest: int = 12) -> str:
    whole = sum(us for _, _, us in row["profile"])
    name = f"{row['way']}, {row['model']}, {row['percent']} %, batch {row['batch']}: {whole / 1e3:.2f} ms"
    of_all = ((f"`{key[:80]}`", str(count), f"{us:.0f}", f"{us / whole:.1%}") for key, count, us in row["profile"])
    return _table([[name, "launches", "us", "share"], *map(list, list(of_all)[:longest])])


def _models(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def shown(found: dict[str, Any]) -> str:
    """Return Markdown with the setting, one table per model, and the profiles."""
    rows = found["rows"]
    clocks = [mhz for row in rows for mhz in row.get("clock_mhz", ()) if mhz]
    setting = [
        f"{found['device']}, {found['dtype']}, guided by {found['guidance']}, {found['threads']} threads",
        f"{found['clock']} time, at most {found['rounds']} rounds, torch {found['torch']}, timm {found['timm']}",
        *([f"clock {min(clocks)} to {max(clocks)} MHz"] if clocks else []),
        *(["memory, host time and launches not measured on CPU"] if found["device"] == "cpu" else []),
        *(["a smoke test, whose figures mean nothing"] if found["smoke"] else []),
    ]
    parts = ["; ".join(setting)]
    for model in _models(rows):
        parts += [f"{model}:", _table([list(HEAD), *(_cells(row, rows) for row in rows if row["model"] == model)])]
    beaten = [row for row in rows if beats_ours(row, rows)]
    if beaten:
        places = (f"{row['way']} ({row['model']}, {row['percent']} %, batch {row['batch']})" for row in beaten)
        parts.append(f"Faster than ours at equal FLOPs: {', '.join(places)}.")
    return "\n\n".join([*parts, *(_profile_table(row) for row in rows if row.get("profile"))])


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Draw the measured speed-up against FLOPs, with one row of panels per model and one column per batch size.

    Args:
        found: the figures of one or more runs.
        file: the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for one in found for row in one["rows"] if "speed_up" in row]
    models, batches = _models(rows), sorted({row["batch"] for row in rows})
    ways = list(dict.fromkeys(row["way"] for row in rows))
    if not rows:
        raise ValueError(f"{file}: no speed-up was measured that could be drawn")
    size = (4 * len(batches), 4 * len(models) + 1)
    figure, panels = plt.subplots(len(models), len(batches), figsize=size, squeeze=False, sharex=True, sharey=True)
    colours = dict(zip(ways, plt.get_cmap("tab20")(range(20)), strict=False))
    most = max(row["flops_ratio"] for row in rows)
    for model, line in zip(models, panels, strict=True):
        for batch, panel in zip(batches, line, strict=True):
            panel.plot((0.5, most), (0.5, most), color="grey", linewidth=1, label="ideal")
            for way in ways:
                own = [row for row in rows if (row["model"], row["batch"], row["way"]) == (model, batch, way)]
                own.sort(key=lambda row: row["flops_ratio"])
                x, y = [row["flops_ratio"] for row in own], [row["speed_up"] for row in own]
                panel.plot(x, y, marker="o", markersize=4, color=colours[way], label=way)
            panel.set(title=f"{model}, batch {batch}", xlabel="dense FLOPs / FLOPs", ylabel="speed-up over dense")
            panel.set(xscale="log", yscale="log")
            ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10) if tick <= 1.2 * most]
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            panel.minorticks_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(7, len(labels)), fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
