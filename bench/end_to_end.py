"""Comparison of whole models: the patched model and its rivals take turns on the same images, with random weights.

    python bench/end_to_end.py --json FILE [--smoke] [--models NAME ...] [--batches N ...] [--mixes PERCENT ...]
        [--ways WAY ...] [--rounds N] [--dtype auto] [--process-time] [--profile WAY ...] [--deadline SECONDS]
    python bench/end_to_end.py --show FILE [FILE ...] [--plot PNG]

A case is a model, a batch size and a mix. A mix is a set of exits, grids and drops that costs a given percentage of the
dense FLOPs, including the guidance model's. The ways to answer are:

* dense, dense-compiled, dense-graphed: timm's model, also through ``torch.compile`` or in a CUDA graph;
* tome: token merging at the FLOPs of the mix (bench/tome.py);
* padded: the same patches of the same images, in plain PyTorch with a key mask (bench/padded.py);
* exits: the same images exit, and all other images go through dense;
* resolution: dense on smaller images, at the FLOPs of the mix, without guidance;
* onnx: dense in ONNX Runtime, on CPU;
* ours, ours-compiled, ours-graphed, and on CPU ours-prepacked: ``patch`` with that option.

The ways of a case take turns, round by round, after a warm-up. FILE is rewritten after each round. A way that fails, or
that has not begun by the deadline, gets a row with the reason. Launches and profiles (``--profile``) are recorded after
the last round of the last case, because a profiler slows later launches on a GPU. ``--show`` prints tables. ``--plot``
draws the measured speed-up against FLOPs. ``--process-time`` measures the CPU time of this process, which with one
thread is meaningful on a shared CPU too.
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
# The smoke test takes seconds, and its figures mean nothing. Its guidance model has the same share of the FLOPs as in
# the real setting, so that the mixes exist.
SMOKE: dict[str, Any] = {"models": ("vit_tiny_patch16_224",), "batches": (1, 8), "rounds": 2}
SMOKE |= {"mixes": tuple(EXITS_ABOVE), "ways": tuple(way for way in WAYS if not way.endswith("compiled"))}
SMOKE_SETTING: dict[str, Any] = {"options": {"num_classes": 10, "depth": 6}}
SMOKE_SETTING |= {"guidance": "test_byobnet", "guidance_size": 256}


def measured(
    subject: Subject, batch: int, percent: int, args: argparse.Namespace, clock: Any, is_late: Any, is_last: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows measured so far, after each round. There is one row per way, in the order of ``args.ways``."""
    case, ways, why_not = Case(subject, batch, percent), list[Way](), dict[str, str]()
    for name in args.ways:
        try:
            if is_late():
                raise NotMeasured(LATE)
            ways.append(case.way(name))
        except NotMeasured as error:
            why_not[name] = str(error)
        except Exception as error:  # an error of one way must not cost the other ways
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
    """Measure every case, and write the file after each round."""
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
                written = args.json.with_suffix(".part")  # atomic, so that a kill cannot leave half a file
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
            except Exception as error:  # an error of one case must not cost the other cases
                write([{"way": way, "why_not": reason(error)} for way in args.ways])
            if CUDA and any(row["way"].endswith("graphed") and "why_not" in row for row in found["rows"]):
                return found  # a failed capture leaves torch's allocator in capture mode
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        torch.compiler.reset()  # frees the models, and the few places for versions of a function
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    to_do = parser.add_mutually_exclusive_group(required=True)
    to_do.add_argument("--json", type=Path, metavar="FILE", help="measure, and write the figures to this file")
    to_do.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="print the figures as tables")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the figures")
    parser.add_argument("--smoke", action="store_true", help="check that all ways work, on a tiny model")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm names of plain Vision Transformers")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N")
    parser.add_argument("--mixes", type=int, nargs="+", choices=tuple(EXITS_ABOVE), metavar="PERCENT")
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", choices=("default", "auto", "float32", "bfloat16", "float16"), default="default")
    parser.add_argument("--process-time", action="store_true", help="on CPU: measure CPU time")
    parser.add_argument("--profile", nargs="+", choices=WAYS, default=(), metavar="WAY", help="ways to profile")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="no way begins after these seconds")
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
        parser.error("--process-time: needs one thread on CPU, because spinning threads count; OMP_NUM_THREADS=1")
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
