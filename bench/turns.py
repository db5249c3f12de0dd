"""Several ways to one answer, timed in turn on the same images."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from measure import CUDA, clock_mhz, spin, synchronize
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

WARM_UPS = 3 if CUDA else 1  # rounds
STREAMED = 4  # calls at least that follow one another without waiting, on CUDA

LATE = "the deadline came"

Profile = list[tuple[str, int, float]]  # of each kernel, or operator on CPU: name, launches and microseconds


def nothing(turn: int) -> None:
    """Done before a call where nothing has to be."""


@dataclass
class Way:
    """One way to answer, and what has been measured of it."""

    name: str
    call: Callable[[Any], Any]
    batches: Sequence[Any]  # of a round
    images: int  # of a batch
    turn_to: Callable[[int], None] = nothing  # before each call, untimed, with the batch's number
    flops: Callable[[], int] | None = None  # of the call before; None: they are counted while it runs
    exits: Sequence[bool] = ()  # of the batches of a round, where one is one image
    captures: bool = False  # whether its memory is taken when it is first called, in a CUDA graph
    round_flops: int = 0
    round_seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # of each call, seconds until its end
    host_seconds: list[float] = field(default_factory=list)  # of each call, by rounds
    peak_bytes: int | None = None  # beyond what was held before
    launches: int | None = None
    profile: Profile | None = None
    why_not: str | None = None  # not measured

    def attempt(self, step: Callable[["Way"], None]) -> None:
        """Take a step, unless an earlier one failed; what fails costs this way's figures, and no other's."""
        if self.why_not is None:
            try:
                step(self)
            except Exception as error:
                self.why_not = reason(error)


def reason(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:120]


def counting() -> FlopCounterMode:
    """Counts the FLOPs of what runs within, attention on CPU too, which torch leaves out."""

    def attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    left_out = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    return FlopCounterMode(display=False, custom_mapping=left_out)


def profiled(call: Callable[[], Any]) -> Profile:
    """Of a call; the longest first."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as found:
        call()
        synchronize()
    name = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [(event.key, event.count, float(getattr(event, name))) for event in found.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def warm_up(way: Way) -> None:
    """Rounds that are not timed: what has to be compiled is, and the first one's FLOPs are counted."""
    held = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    for turn, images in enumerate(way.batches):
        way.turn_to(turn)
        if way.flops is None:
            with counting() as counter:
                way.call(images)
            way.round_flops += counter.get_total_flops()
        else:
            way.call(images)
            way.round_flops += way.flops()
    for _ in range(WARM_UPS - 1):
        for turn, images in enumerate(way.batches):
            way.turn_to(turn)
            way.call(images)
    synchronize()
    if not CUDA:
        return
    if not way.captures:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way.turn_to(0)
        way.call(way.batches[0])
        synchronize()
    way.peak_bytes = torch.cuda.max_memory_allocated() - held


def look_at(way: Way, keeps_profile: bool) -> None:
    """Count a call's launches and, if it is to be kept, how long each kernel takes."""
    way.turn_to(0)
    found = profiled(lambda: way.call(way.batches[0]))
    if CUDA:
        way.launches = sum(count for _, count, _ in found)
    if keeps_profile:
        way.profile = found


def timed_round(way: Way, clock: Callable[[], float]) -> None:
    """One call after the other, each waited for."""
    waited = []
    for turn, images in enumerate(way.batches):
        way.turn_to(turn)
        synchronize()
        start = clock()
        way.call(images)
        synchronize()
        waited.append(clock() - start)
    way.waited += waited
    if not CUDA:
        way.round_seconds.append(sum(waited))


def streamed_round(way: Way) -> None:
    """On CUDA: calls that are not waited for, so that the host prepares the next one while the device works.

    What turns to another batch is timed too: a copy of some microseconds, which only an image that exits would notice.
    """
    calls, host = max(STREAMED, len(way.batches)), 0.0
    synchronize()
    start = time.perf_counter()
    for turn in range(calls):
        way.turn_to(turn % len(way.batches))
        begun = time.perf_counter()
        way.call(way.batches[turn % len(way.batches)])
        host += time.perf_counter() - begun
    synchronize()
    way.round_seconds.append((time.perf_counter() - start) * len(way.batches) / calls)
    way.host_seconds.append(host / calls)


@torch.inference_mode()
def take_turns(
    ways: Sequence[Way],
    rounds: int,
    clock: Callable[[], float],
    is_late: Callable[[], bool],
    profile_too: Sequence[str] | None,
) -> Iterator[list[int | None]]:
    """Warm up, then time every way in every round.

    Args:
        ways: are written into.
        rounds: fewer, but two, where it gets late.
        clock: seconds.
        is_late: whether the deadline has come; a way that is not warm by then is not measured.
        profile_too: names of ways whose profile is kept. Nothing must be timed in the process afterwards, since a
            profiler leaves later launches slower; None profiles nothing, and counts no launches.

    Yields:
        After each round and at the end, the GPU's clock before and now, in MHz.
    """
    for way in ways:
        if is_late():
            way.why_not = LATE
        way.attempt(warm_up)
    spin()
    before = clock_mhz() if CUDA else None
    for turn in range(rounds):
        if turn >= 2 and is_late():
            break
        for way in ways:
            way.attempt(lambda way: timed_round(way, clock))
            if CUDA:
                way.attempt(streamed_round)
        yield [before, clock_mhz() if CUDA else None]
    if profile_too is None:
        return
    for way in ways:
        if way.why_not is None and (CUDA or way.name in profile_too):
            with suppress(Exception):  # its figures are there
                look_at(way, way.name in profile_too)
    yield [before, clock_mhz() if CUDA else None]


def figures(way: Way, dense: Sequence[Way], dense_round_flops: int) -> dict[str, Any]:
    """What is reported of a way that was measured.

    Args:
        way: measured in turn with
        dense: the ways whose fastest it is held against.
        dense_round_flops: of a round, dense.
    """
    exits = [waited for turn, waited in enumerate(way.waited) if way.exits and way.exits[turn % len(way.exits)]]
    found: dict[str, Any] = {
        "images_per_s": way.images * len(way.batches) / statistics.median(way.round_seconds),
        "p50_ms": 1e3 * statistics.median(way.waited),
        "p99_ms": 1e3 * sorted(way.waited)[int(0.99 * len(way.waited))],
        "exit_ms": 1e3 * statistics.median(exits) if exits else None,
        "calls": len(way.waited),
        "flops_ratio": dense_round_flops / way.round_flops,
        "gb": None if way.peak_bytes is None else way.peak_bytes / 1e9,
        "host_ms": 1e3 * statistics.median(way.host_seconds) if way.host_seconds else None,
        "launches": way.launches,
    }
    if dense:
        rival = min(dense, key=lambda way: statistics.median(way.round_seconds))
        pairs = zip(rival.round_seconds, way.round_seconds, strict=True)
        found["speed_up"] = statistics.median(theirs / own for theirs, own in pairs)
        found["of_ideal"] = found["speed_up"] / found["flops_ratio"]
    if way.profile:
        found["profile"] = way.profile
    return found
