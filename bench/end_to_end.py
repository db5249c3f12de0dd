"""What a user would pick instead, in one run: whole models with random weights, every way in turn on the same images.

    python bench/end_to_end.py --json FILE [--smoke] [--models NAME ...] [--batches N ...] [--mixes PERCENT ...]
        [--ways WAY ...] [--rounds N] [--dtype auto] [--process-time] [--profile WAY ...] [--deadline SECONDS]
    python bench/end_to_end.py --show FILE [FILE ...] [--plot PNG]

A case is a model, a batch size and a mix of exits, grids and drops that takes a given share of the dense FLOPs, the
guidance's counted. The ways:

* dense, dense-compiled, dense-graphed: timm's own, through ``torch.compile``, or in a CUDA graph;
* tome: token merging, as many tokens a layer as cost what the mix does (bench/tome.py);
* padded: the same patches of the same images, in plain PyTorch under a key mask (bench/padded.py);
* exits: the same images exit, all others go through dense;
* resolution: all images so small that dense costs what the mix does; no guidance;
* onnx: dense in ONNX Runtime, on CPU;
* ours, ours-compiled, ours-graphed; ours-prepacked on CPU: ``patch``, with that option.

Ways of a case take turns, round by round, after a warm-up. FILE is written anew after each round; a way that fails, or
that has not begun by the deadline, is a row that says so. Launches, and what ``--profile`` names, are looked at in the
last case, behind its last round, because what is timed after a profiler is slower on a GPU. ``--show`` prints tables
and ``--plot`` draws realised speed-up against FLOPs. ``--process-time`` counts the time that the process ran: with one
thread, what it takes on a CPU that is shared.
"""

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from end_to_end_page import plot, shown
from measure import CUDA, DEVICE, DTYPE
from mixes import DISTINCT, EXITS_ABOVE
from rivals import WAYS, Case, NotMeasured, Subject
from turns import LATE, Way, figures, reason, take_turns

from tinydrop_kernels.cli.options import fast_dtype

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "deit3_large_patch16_224", "vit_large_patch14_dinov2")
DEFAULTS: dict[str, Any] = {"mixes": tuple(EXITS_ABOVE), "ways": WAYS, "rounds": 10 if CUDA else 5}
DEFAULTS |= {"models": MODELS if CUDA else MODELS[:1], "batches": (1, 8, 64, 256) if CUDA else (1, 8, 32)}
SETTING: dict[str, Any] = {"options": {"num_classes": 1000}, "guidance": "efficientformer_l1", "guidance_size": None}
# Seconds, and figures that mean nothing. The guidance is as large, beside the model, as for the others.
SMOKE: dict[str, Any] = {"models": ("vit_tiny_patch16_224",), "batches": (1, 8), "rounds": 2}
SMOKE |= {"mixes": tuple(EXITS_ABOVE), "ways": tuple(way for way in WAYS if not way.endswith("compiled"))}
SMOKE_SETTING: dict[str, Any] = {"options": {"num_classes": 10, "depth": 6}}
SMOKE_SETTING |= {"guidance": "test_byobnet", "guidance_size": 256}


def measured(
    subject: Subject, batch: int, percent: int, args: argparse.Namespace, clock: Any, is_late: Any, is_last: bool
) -> Iterator[list[dict[str, Any]]]:
    """A row for each way, in the order asked for: again after each round, of what was measured until then."""
    case, ways, why_not = Case(subject, batch, percent), list[Way](), dict[str, str]()
    for name in args.ways:
        try:
            if is_late():
                raise NotMeasured(LATE)
            ways.append(case.way(name))
        except NotMeasured as error:
            why_not[name] = str(error)
        except Exception as error:  # one way's, not the others'
            why_not[name] = reason(error)
    for clocks in take_turns(ways, args.rounds, clock, is_late, args.profile if is_last else None):
        done = [way for way in ways if way.why_not is None and way.round_seconds]
        dense = [way for way in done if way.name in ("dense", "dense-compiled")]
        found = {way.name: figures(way, dense, case.dense_flops * batch * len(case.batches)) for way in done}
        found |= {way.name: {"why_not": way.why_not} for way in ways if way.why_not is not None}
        found |= {name: {"why_not": why} for name, why in why_not.items()}
        rows = [{"way": name} | found[name] for name in args.ways if name in found]
        yield [row | ({"clock_mhz": clocks} if CUDA and "why_not" not in row else {}) for row in rows]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every case, writing as it goes."""
    started = time.monotonic()

    def is_late() -> bool:
        return time.monotonic() - started > args.deadline

    clock = time.process_time if args.process_time else time.perf_counter
    dtype = {"default": DTYPE, "auto": fast_dtype(DEVICE.type)}.get(args.dtype) or getattr(torch, args.dtype)
    setting = SMOKE_SETTING if args.smoke else SETTING
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "guidance": setting["guidance"],
        "threads": torch.get_num_threads(),
        "clock": "process" if args.process_time else "wall",
        "rounds": args.rounds,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "smoke": args.smoke,
        "rows": [],
    }
    last = args.models[-1], args.batches[-1], args.mixes[-1]
    for model in args.models:
        subject = None
        for batch, percent in ((batch, percent) for batch in args.batches for percent in args.mixes):
            before, place = found["rows"], {"model": model, "batch": batch, "percent": percent}

            def write(case: list[dict[str, Any]], before: list[Any] = before, place: dict[str, Any] = place) -> None:
                found["rows"] = before + [place | row for row in case]
                written = args.json.with_suffix(".part")  # a kill leaves the file before or behind
                written.write_text(json.dumps(found, indent=1) + "\n")
                written.replace(args.json)

            try:
                if is_late():
                    raise NotMeasured(LATE)
                subject = subject or Subject(model, **setting, dtype=dtype)
                is_last = (model, batch, percent) == last
                for case in measured(subject, batch, percent, args, clock, is_late, is_last):
                    write(case)
            except NotMeasured as error:
                write([{"way": way, "why_not": str(error)} for way in args.ways])
            except Exception as error:  # one case's, not the others'
                write([{"way": way, "why_not": reason(error)} for way in args.ways])
            if CUDA and any(row["way"].endswith("graphed") and "why_not" in row for row in found["rows"]):
                return found  # after a capture that failed, torch's allocator believes that it is under way
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        torch.compiler.reset()  # it keeps a few versions of a function at most, and its models with them
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    to_do = parser.add_mutually_exclusive_group(required=True)
    to_do.add_argument("--json", type=Path, metavar="FILE", help="measure, and write figures there")
    to_do.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print figures as tables")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them, too")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few rounds: to see that all ways work")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm's names of plain Vision Transformers")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N")
    parser.add_argument("--mixes", type=int, nargs="+", choices=tuple(EXITS_ABOVE), metavar="PERCENT")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", choices=("default", "auto", "float32", "bfloat16", "float16"), default="default")
    parser.add_argument("--process-time", action="store_true", help="on CPU: count the time that this process ran")
    parser.add_argument("--profile", nargs="+", choices=WAYS, default=(), metavar="WAY", help="in the last case")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="in seconds, for a way to begin")
    args = parser.parse_args()
    for name, default in (SMOKE if args.smoke else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for batch in args.batches:
        if batch < 1 or (batch % DISTINCT and DISTINCT % batch):
            parser.error(f"--batches: got {batch}, expected a divisor or a multiple of {DISTINCT}")
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected a number >= 1")
    if args.process_time and (CUDA or torch.get_num_threads() > 1):
        parser.error("--process-time: for one thread on CPU, since those that spin count as running; OMP_NUM_THREADS=1")
    return args


@torch.inference_mode()
def main() -> None:
    args = parsed()
    found = [run(args)] if args.json else [json.loads(file.read_text()) for file in args.show]
    print(*map(shown, found), sep="\n\n")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
