"""What each process of a long run holds, step by step: memory, threads, open files; and whether any of it grows.

Each process is looked at ten times a second; a step has the median and the least of the time until the next one was finished.
What a rank holds is its own word (`rollout.pulse.Pulse.held`): before each checkpoint it gives freed memory back and looks at
once. So what a step needs for itself (an evaluation, a long batch, the bytes of a checkpoint that is being written) and what
glibc keeps of it are not in it; what is used and never let go is.

Growth is the median of what a rank held in the last WINDOW steps against that of the WINDOW steps after SETTLED; of another
process, the least of the one window against the least of the other. The medians of all looks are told beside: they follow what
the steps do, of which the longest output and the rounds of sampling stand in the record too.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks.soak.place import Place, rows_of, steps_of
from benchmarks.soak.processes import (
    Footprint,
    Process,
    files_of_shared_memory,
    footprint,
    new_mark,
    processes_of,
    shared_memory,
    wait_until_gone,
)
from rollout.errors import InputError
from trainer.hang_report import Health
from trainer.metrics import number
from trainer.report_writer import health_path

SETTLED = 50
"""Steps after which memory shall not grow."""
WINDOW = 25
MAX_GROWTH = 0.02
EARLY, LATE = 20, 200
"""Counts of threads, files, processes and shared memory after so many steps, and at the end, shall be equal."""
LIST_SECONDS = 1.0
"""Between two looks at which processes there are: that takes longer."""
WORK = ("length/max", "sampling/rounds")
AROUND = 5
"""Steps on each side: the window of a count after a step."""


@dataclass(slots=True)
class Series:
    """Over the steps 1, 2, …: one list a process's name (`benchmarks.soak.processes.Process.name`)."""

    mib: dict[str, list[float]] = field(default_factory=dict)
    least: dict[str, list[float]] = field(default_factory=dict)
    held: dict[str, list[float | None]] = field(default_factory=dict)
    """Of the ranks; None before the first checkpoint. All three in MiB."""
    threads: dict[str, list[int]] = field(default_factory=dict)
    files: dict[str, list[int]] = field(default_factory=dict)
    processes: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    """Files in /dev/shm that the run's processes have mapped or open."""
    work: dict[str, list[float]] = field(default_factory=dict)
    """What the steps did, by the metric's name."""
    left: list[str] = field(default_factory=list)
    """Processes after the run's end, and files in /dev/shm that they had and that belong to nobody now."""

    @classmethod
    def of(cls, record: dict[str, Any]) -> Series:
        """From what `as_dict` gave."""
        return cls(**{each.name: record[each.name] for each in fields(cls)})

    @property
    def steps(self) -> int:
        return len(self.processes)

    def growth(self) -> dict[str, float]:
        """Process → its memory's growth after SETTLED steps, as a share. Those of the whole run alone."""
        others = {name: values for name, values in self.least.items() if name not in self.held}
        told = {name: values for name, values in self.held.items() if None not in values[SETTLED:]}
        return self._grown(others, min) | self._grown(told, median)

    def median_growth(self) -> dict[str, float]:
        """The same of what it holds in the middle of its steps: no promise, as it grows with what the steps do."""
        return self._grown(self.mib, median)

    def _grown(self, series: dict[str, list[float]], figure: Callable[[list[float]], float]) -> dict[str, float]:
        grown = {}
        for name, values in series.items():
            if len(values) == self.steps >= SETTLED + 2 * WINDOW:
                grown[name] = figure(values[-WINDOW:]) / figure(values[SETTLED : SETTLED + WINDOW]) - 1
        return grown

    def counts(self) -> dict[str, tuple[float, float, float]]:
        """What is counted → (after EARLY steps, after LATE steps, at the end)."""
        series = {"processes": self.processes, "shared memory": self.shared}
        series |= {f"threads of {name}": values for name, values in self.threads.items() if len(values) == self.steps}
        series |= {f"files of {name}": values for name, values in self.files.items() if len(values) == self.steps}
        around = lambda values, step: min(values[step - 1 - AROUND : step + AROUND])  # noqa: E731
        if self.steps < LATE + AROUND:
            return {}
        ends = self.steps - AROUND
        return {name: (around(values, EARLY), around(values, LATE), around(values, ends)) for name, values in series.items()}

    def faults(self) -> list[str]:
        """What grew or was left, in words."""
        growth = self.growth()
        grown = [f"{name} grew by {share:.1%}" for name, share in growth.items() if share > MAX_GROWTH]
        grown += [f"{name} did not say what it held" for name in self.held if name not in growth and growth]
        counted = [
            f"{name}: {early:g} after {EARLY} steps, {late:g} after {LATE}, {end:g} at the end"
            for name, (early, late, end) in self.counts().items()
            if max(late, end) > early
        ]
        return grown + counted + ([f"left at the end: {', '.join(self.left)}"] if self.left else [])

    def as_dict(self) -> dict[str, Any]:
        growth = {"growth": self.growth(), "median_growth": self.median_growth()}
        return asdict(self) | growth | {"counts": self.counts(), "faults": self.faults()}


def watch(place: Place, run: Path, more: list[str], *, note: Callable[[str], None], seconds: float = 0.1) -> Series:
    """A whole run, looked at every so many seconds. Raises InputError where it fails."""
    mark, series = new_mark(), Series()
    names: set[str] = set()
    """Of the files in shared memory that its processes have had."""
    process = place.start(run, mark, *more)
    step, seen = 0, Seen()
    living: list[Process] = []
    listed = 0.0
    while process.poll() is None:
        if time.monotonic() - listed > LIST_SECONDS:
            living, listed = [each for each in processes_of(mark) if each.kind != "helper"], time.monotonic()
            names |= seen.count(living)
        finished = steps_of(run)
        if finished > step:
            seen.close(series, finished - step, {each.name: held_mib(run, each.rank) for each in living if each.kind == "rank"})
            step, seen, listed = finished, Seen(), 0.0
            if step % 10 == 0:
                note(f"step {step}")
        seen.look(living)
        time.sleep(seconds)
    if process.returncode:
        raise InputError(f"{run.with_suffix('.log')}: the run ended with exit code {process.returncode}; read its end")
    rows = [row for row in rows_of(run) if row["kind"] == "train"][: series.steps]
    series.work = {name: [number(row, name) or 0.0 for row in rows] for name in WORK}
    series.left = [each.name for each in wait_until_gone(mark, 30.0)]
    series.left += sorted((names & files_of_shared_memory()) - shared_memory(psutil.pids()))
    return series


def held_mib(run: Path, rank: int) -> float | None:
    """What the rank last said."""
    with suppress(OSError):
        return Health.from_json(health_path(run, rank).read_text(encoding="utf-8")).held / 2**20 or None
    return None


class Seen:
    """Looks since the last step."""

    def __init__(self) -> None:
        self._held: dict[str, list[Footprint]] = defaultdict(list)
        self._processes: list[int] = []
        self._shared: list[int] = []

    def count(self, living: Sequence[Process]) -> set[str]:
        """The names of their files in shared memory."""
        names = shared_memory(each.pid for each in living)
        self._processes.append(len(living))
        self._shared.append(len(names))
        return names

    def look(self, living: Sequence[Process]) -> None:
        names: dict[str, int] = defaultdict(int)
        for each in living:
            held = footprint(each.pid)
            if held is not None:
                names[each.name] += 1
                suffix = f" ({names[each.name]})" if names[each.name] > 1 else ""
                self._held[each.name + suffix].append(held)

    def close(self, series: Series, steps: int, held: Mapping[str, float | None]) -> None:
        """Adds this to the series, for each of the steps that were finished at once. held: MiB, of each rank."""
        for _ in range(steps):
            for name, value in held.items():
                series.held.setdefault(name, []).append(value)
            for name, looks in self._held.items():
                for values, value in (
                    (series.mib, median(each.bytes for each in looks) / 2**20),
                    (series.least, min(each.bytes for each in looks) / 2**20),
                    (series.threads, median(each.threads for each in looks)),
                    (series.files, median(each.files for each in looks)),
                ):
                    column = values.setdefault(name, [])
                    if len(column) == series.steps:
                        column.append(value)
            series.processes.append(round(median(self._processes)) if self._processes else 0)
            series.shared.append(round(median(self._shared)) if self._shared else 0)
