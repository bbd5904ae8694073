"""Fair timing: every contender once a round, in an order that turns from round to round, all in one process."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds over `rounds` rounds."""

    median: float
    p10: float
    p90: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed, and what puts it back before each time without being timed (an in-place backward eats its input)."""

    run: Callable[[], object]
    before: Callable[[], None] | None = None


class Clock(Protocol):
    def milliseconds(self, timed: Timed) -> float: ...


def orders(names: Sequence[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """One order a round: turned by one place each round, so that all stand equally often in each place, and backwards in every
    second turn, so that nobody always runs after the same neighbour."""
    count = len(names)
    for turn in range(rounds):
        shift = turn % count if count else 0
        order = (*names[shift:], *names[:shift])
        yield order[::-1] if count and (turn // count) % 2 else order


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values; raises ValueError for none."""
    if not values:
        raise ValueError("values: a quantile of nothing")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread:
    return Spread(quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9), len(values))


def rounds_for(one_round_ms: float, budget_s: float, at_least: int = 5, at_most: int = 50) -> int:
    """Rounds that fit the budget; never fewer than at_least, for fewer give no quantiles."""
    return max(at_least, min(at_most, int(1000 * budget_s / max(one_round_ms, 1e-3))))


@dataclass(frozen=True, slots=True)
class Timings:
    """spreads of those who could be timed; failures of the others (out of memory beside the rest, say)."""

    spreads: dict[str, Spread]
    failures: dict[str, Exception]


def interleave(contenders: Mapping[str, Timed], clock: Clock, budget_s: float, at_least: int = 5) -> Timings:
    """Times all contenders in turn. A first round is not counted: it warms up what the caller has run once already, and says how
    many rounds the budget holds. Who fails drops out."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    failures: dict[str, Exception] = {}

    def take(name: str) -> float:
        if name in failures:
            return 0.0
        try:
            return clock.milliseconds(contenders[name])
        except Exception as error:  # whatever it is, the others go on
            failures[name] = error.with_traceback(None)  # a traceback would keep its tensors
            return 0.0

    one_round = sum(take(name) for name in contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for order in orders(list(contenders), rounds_for(one_round, budget_s, at_least)):
            for name in order:
                samples[name].append(take(name))
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return Timings({name: spread(values) for name, values in samples.items() if name not in failures}, failures)


class CpuClock:
    """Wall time. Caches are left as the run before left them: the operands of all that takes long are far larger."""

    def milliseconds(self, timed: Timed) -> float:
        if timed.before is not None:
            timed.before()
        start = time.perf_counter()
        timed.run()
        return 1000 * (time.perf_counter() - start)


class CudaClock:
    """CUDA events around the call. A buffer several times the L2 is zeroed before, so that no contender finds its operands
    cached; while the device does that the host runs ahead, so that launches count only where they are slower than the work."""

    def __init__(self, device: torch.device) -> None:
        size = 4 * max(torch.cuda.get_device_properties(device).L2_cache_size, 1 << 26)
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def milliseconds(self, timed: Timed) -> float:
        if timed.before is not None:
            timed.before()
        self._flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        timed.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()
