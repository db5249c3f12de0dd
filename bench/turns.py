"""Timing of several ways to answer, which take turns on the same images."""

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
STREAMED = 4  # smallest number of calls in a round without waiting, on CUDA

LATE = "the deadline came"

Profile = list[tuple[str, int, float]]  # name, launches and microseconds of each kernel, or of each operator on CPU


def nothing(turn: int) -> None:
    """Do nothing. This is the default of ``Way.turn_to``."""


@dataclass
class Way:
    """One way to answer, and its measurements."""

    name: str
    call: Callable[[Any], Any]
    batches: Sequence[Any]  # the batches of a round
    images: int  # per batch
    turn_to: Callable[[int], None] = nothing  # called before each call with the batch's number; not timed
    flops: Callable[[], int] | None = None  # returns the FLOPs of the last call; None counts them during the call
    exits: Sequence[bool] = ()  # for each batch of a round, True if its only image exits; empty for larger batches
    captures: bool = False  # True if the first call allocates all memory, in a CUDA graph
    round_flops: int = 0
    round_seconds: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)  # seconds until the end of each call
    host_seconds: list[float] = field(default_factory=list)  # host seconds per call, one value per round
    peak_bytes: int | None = None  # beyond the memory in use before
    launches: int | None = None
    profile: Profile | None = None
    why_not: str | None = None  # reason if the way was not measured

    def attempt(self, step: Callable[["Way"], None]) -> None:
        """Take a step, unless an earlier step failed. An error is recorded, so that other ways are still measured."""
        if self.why_not is None:
            try:
                step(self)
            except Exception as error:
                self.why_not = reason(error)


def reason(error: Exception) -> str:
    """Return an error as one short line."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:120]


def counting() -> FlopCounterMode:
    """Return a context that counts FLOPs, including attention on CPU, which torch does not count."""

    def attention(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
        return sdpa_flop_count(query, key, value)

    left_out = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    return FlopCounterMode(display=False, custom_mapping=left_out)


def profiled(call: Callable[[], Any]) -> Profile:
    """Return the profile of a call, the longest kernel first."""
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as found:
        call()
        synchronize()
    name = "self_device_time_total" if CUDA else "self_cpu_time_total"
    rows = [(event.key, event.count, float(getattr(event, name))) for event in found.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def warm_up(way: Way) -> None:
    """Run rounds that are not timed, so that everything is compiled. Record FLOPs and peak memory."""
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
    """Record the number of launches of a call and, with ``keeps_profile``, its profile."""
    way.turn_to(0)
    found = profiled(lambda: way.call(way.batches[0]))
    if CUDA:
        way.launches = sum(count for _, count, _ in found)
    if keeps_profile:
        way.profile = found


def timed_round(way: Way, clock: Callable[[], float]) -> None:
    """Time a round of calls, and wait for the end of each call."""
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
    """Time a round of calls on CUDA without waiting, so that the host prepares a call while the device works.

    The time includes ``turn_to``, a copy of a few microseconds, which is negligible unless a single image exits.
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
        ways: the ways to time. Measurements are written into them.
        rounds: number of rounds. After the deadline, there are only two.
        clock: returns seconds.
        is_late: returns True after the deadline. A way that has not been warmed up by then is not measured.
        profile_too: names of ways whose profile is kept. Nothing may be timed in the process afterwards, because a
            profiler slows later launches. With None, nothing is profiled and launches are not counted.

    Yields:
        The GPU's clock before the first round and now in MHz, after each round and at the end.
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
            with suppress(Exception):  # the figures are measured, so a failing profiler costs nothing
                look_at(way, way.name in profile_too)
    yield [before, clock_mhz() if CUDA else None]


def figures(way: Way, dense: Sequence[Way], dense_round_flops: int) -> dict[str, Any]:
    """Return the reported figures of a measured way.

    Args:
        way: the way.
        dense: dense ways measured in turn with ``way``. The speed-up is over the fastest of them.
        dense_round_flops: dense FLOPs of a round.
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
