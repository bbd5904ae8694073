"""The recipe's signs of failure, read off the metrics rows: a pure function of the train rows so far, one row at a time.

A step's cause is bad or not by these rules (bounds and numbers of steps: `trainer.config_guards.AlarmsConfig`; "mean" is over its
`steps` last steps; S is where a rule starts anew with each stage, whose context and objective make the quantity jump):

    entropy          S  entropy/mean outside the band around TER's target, or without TER around the stage's first mean
    language            mean of language/mixed above its least mean by more than the bound
    repetition       S  the same of verdict/repetition
    truncation       S  the same of verdict/truncated
    length           S  mean of length/mean below the bound's part of its greatest mean
    recovery_empty   S  with recovery: recovery/size is 0 after the step
    recovery_unused  S  with recovery: groups waited before the step, and ledger/recovered did not grow in it
    over_generation  S  dynamic: mean of sampling/over_generation above the bound
    mismatch            mismatch/mean above mismatch/mean_bound, or not finite

An alarm begins after its own number of bad steps in a row (1 where the rule is of a mean) and ends after `steps` in a row that
are not. A step without the quantity says nothing and changes nothing. Each step's row gets alarm/<name>, 1 while the alarm lasts
and else 0; absent where it is off or says nothing. When a run goes on from a checkpoint the rows up to there are read again, so
the alarms stand as they stood.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from trainer.config import StageConfig
from trainer.config_guards import AlarmsConfig
from trainer.metrics import number
from trainer.mismatch import alarm_text, calm_text

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """One step's. text: value and bound, for a person."""

    bad: bool
    text: str


class Alarms:
    """stages: the run's. note: told when an alarm begins and when it ends. show: given a line for each that lasts."""

    def __init__(
        self,
        settings: AlarmsConfig,
        stages: Sequence[StageConfig],
        note: Callable[[str], None] = lambda _: None,
        show: Callable[[tuple[str, ...]], None] = lambda _: None,
    ) -> None:
        self._note, self._show, self._stages, self._stop = note, show, stages, settings.stop
        self._lasting: dict[str, str] = {}
        self._stage: Any = None
        self._watches = watches(settings)

    def see(self, row: Row) -> dict[str, int]:
        """The alarms after a train row, as metrics of the same row."""
        found, step = self._next(row)
        for name, (began, reading) in found.items():
            watch = self._watches[name]
            if began:
                self._note(f"step {step}: ALARM {name}: {reading.text}; look at {watch.look_at}")
            else:
                self._note(f"step {step}: alarm {name} ends: {watch.calm(reading)}")
        self._show(tuple(f"{name}: {text}" for name, text in self._lasting.items()))
        return {f"alarm/{name}": int(watch.lasts) for name, watch in self._watches.items() if watch.said}

    def recall(self, rows: Iterable[Row]) -> None:
        """As after these train rows, without a word but of what lasts."""
        for row in rows:
            self._next(row)
        self._show(tuple(f"{name}: {text}" for name, text in self._lasting.items()))

    def why_stop(self) -> str | None:
        """One line where an alarm lasts that was told to end the run."""
        for name in self._stop:
            if name in self._lasting:
                return (
                    f"alarm {name}: {self._lasting[name]}; alarms.stop names it; look at {self._watches[name].look_at}, then go "
                    "on, or take it out of alarms.stop"
                )
        return None

    def _next(self, row: Row) -> tuple[dict[str, tuple[bool, Reading]], int]:
        """(what begins (True) or ends (False) with this row, its step)."""
        index = int(number(row, "stage") or 0)
        anew = index != self._stage and self._stage is not None
        self._stage = index
        changes = {}
        for name, watch in self._watches.items():
            before = watch.lasts
            if anew and watch.of_a_stage:
                watch.restart()
            reading = watch.take(row, self._stages[min(index, len(self._stages) - 1)])
            if watch.lasts:
                if reading is not None and reading.bad:
                    self._lasting[name] = reading.text
            else:
                self._lasting.pop(name, None)
            if watch.lasts != before:
                changes[name] = (watch.lasts, reading or Reading(False, "a new stage begins"))
        return changes, row["step"]


@dataclass(slots=True)
class Watch:
    """One alarm. rule: gives a row's reading, None where it says nothing; made anew by `make` where the rule starts anew."""

    make: Callable[[], Callable[[Row, StageConfig], Reading | None]]
    look_at: str
    ends_after: int
    begins_after: int = 1
    of_a_stage: bool = True
    calm: Callable[[Reading], str] = lambda reading: reading.text
    lasts: bool = False
    said: bool = False
    _in_a_row: int = 0
    """Steps in a row that speak against how it stands."""
    _rule: Any = field(default=None)

    def __post_init__(self) -> None:
        self._rule = self.make()

    def restart(self) -> None:
        self._rule, self.lasts, self._in_a_row = self.make(), False, 0

    def take(self, row: Row, stage: StageConfig) -> Reading | None:
        reading = self._rule(row, stage)
        self.said = reading is not None
        if reading is None:
            return None
        self._in_a_row = self._in_a_row + 1 if reading.bad != self.lasts else 0
        if self._in_a_row >= (self.ends_after if self.lasts else self.begins_after):
            self.lasts, self._in_a_row = reading.bad, 0
        return reading


def watches(settings: AlarmsConfig) -> dict[str, Watch]:
    """Those that are on, by name, in the order of `trainer.config_guards.ALARMS`."""
    steps = settings.steps

    def on(bound: Any, make: Callable[[], Any], look_at: str, begins_after: int = 1, **more: Any) -> Watch | None:
        return None if bound is None else Watch(make, look_at, steps, begins_after, **more)

    def rising(bound: float | None, key: str, what: str, look_at: str, **more: Any) -> Watch | None:
        return on(bound, lambda: Rising(steps, bound, key, what), look_at, **more)

    found = {
        "entropy": on(
            settings.entropy_band or settings.entropy_drift, lambda: Entropy(settings),
            "objective.entropy_target and entropy_coefficient, actor.lr, and the outputs: too low, all are alike; too high, they "
            "fall apart and mix languages",
            settings.entropy_steps,
        ),
        "language": rising(
            settings.language, "language/mixed", "outputs that mix languages",
            "entropy (a target too high, or a coefficient too weak) and at outputs", of_a_stage=False,
        ),
        "repetition": rising(
            settings.repetition, "verdict/repetition", "outputs refused for repetition",
            "outputs, in the thinking first, and at entropy/mean",
        ),
        "truncation": rising(
            settings.truncation, "verdict/truncated", "outputs cut off at the limit",
            "length/mean against the context: the next stage may be due; or outputs whose thinking never ends",
        ),
        "length": on(
            settings.length, lambda: Falling(steps, settings.length),
            "outputs (is thinking still there?), verdict/format and reward/accuracy",
        ),
        "recovery_empty": on(
            settings.recovery_empty, lambda: recovery_empty,
            "batch.prompts_per_round (a round that leaves no surplus) and ledger/uniform (prompts too easy or too hard)",
            settings.recovery_empty,
        ),
        "recovery_unused": on(
            settings.recovery_unused, RecoveryUnused,
            "ledger/expired, batch.group_size and data.max_prompt_tokens: the stage cannot use what it keeps",
            settings.recovery_unused,
        ),
        "over_generation": on(
            settings.over_generation, lambda: OverGeneration(steps, settings.over_generation),
            "reward/accuracy and ledger/uniform: the prompts are too easy or too hard for this policy",
        ),
        "mismatch": on(
            settings.mismatch, lambda: mismatch,
            "the weight push (engine.wire, its probe), at the engine's dtype and kernels, and at mismatch/* over the last steps; "
            "objective.tis_cap bounds what it does to the loss",
            settings.mismatch, of_a_stage=False, calm=lambda reading: f"sampler and trainer agree again: {reading.text}",
        ),
    }  # fmt: skip
    return {name: watch for name, watch in found.items() if watch is not None}


class Means:
    """Means over the last so many values."""

    def __init__(self, steps: int) -> None:
        self._last: deque[float] = deque(maxlen=steps)

    def add(self, value: float) -> float | None:
        """The mean with this value; None while there are too few."""
        self._last.append(value)
        return fmean(self._last) if len(self._last) == self._last.maxlen else None


class Entropy:
    def __init__(self, settings: AlarmsConfig) -> None:
        self._settings, self._start = settings, Means(settings.steps)
        self._first: float | None = None
        """The mean over the stage's first steps."""

    def __call__(self, row: Row, _stage: StageConfig) -> Reading | None:
        value, target = number(row, "entropy/mean"), number(row, "entropy/target")
        if value is None:
            return None
        band, about, around = self._settings.entropy_band, target, "target"
        if not target:
            band, about, around = self._settings.entropy_drift, self._first, "the stage's first mean"
            if self._first is None:
                self._first = self._start.add(value)
        if band is None or about is None:
            return None
        low, high = band[0] * about, band[1] * about
        text = f"mean entropy {value:.3g} nats, band {low:.3g} to {high:.3g} ({around} {about:.3g})"
        return Reading(not low <= value <= high, text)


class Rising:
    def __init__(self, steps: int, bound: float, key: str, what: str) -> None:
        self._means, self._steps, self._bound, self._key, self._what = Means(steps), steps, bound, key, what
        self._least = 1.0

    def __call__(self, row: Row, _stage: StageConfig) -> Reading | None:
        value = number(row, self._key)
        if value is None and self._key.startswith("verdict/") and number(row, "length/mean") is not None:
            value = 0.0  # a verdict that no output got has no key
        mean = None if value is None else self._means.add(value)
        if mean is None:
            return None
        self._least = min(self._least, mean)
        bound = self._least + self._bound
        return Reading(mean > bound, f"{self._what} {mean:.1%}, mean of {self._steps} steps, bound {bound:.1%}")


class Falling:
    def __init__(self, steps: int, part: float) -> None:
        self._means, self._steps, self._part = Means(steps), steps, part
        self._greatest = 0.0

    def __call__(self, row: Row, _stage: StageConfig) -> Reading | None:
        value = number(row, "length/mean")
        mean = None if value is None else self._means.add(value)
        if mean is None:
            return None
        self._greatest = max(self._greatest, mean)
        bound = self._part * self._greatest
        return Reading(mean < bound, f"mean length {mean:,.0f} tokens, mean of {self._steps} steps, bound {bound:,.0f}")


class OverGeneration:
    def __init__(self, steps: int, bound: float) -> None:
        self._means, self._steps, self._bound = Means(steps), steps, bound

    def __call__(self, row: Row, stage: StageConfig) -> Reading | None:
        value = number(row, "sampling/over_generation") if stage.batch.dynamic else None
        mean = None if value is None else self._means.add(value)
        if mean is None:
            return None
        text = f"{mean:.1f} groups sampled for each trained on, mean of {self._steps} steps, bound {self._bound:g}"
        return Reading(mean > self._bound, text)


def recovery_empty(row: Row, stage: StageConfig) -> Reading | None:
    size = number(row, "recovery/size")
    if size is None or not stage.recovery.enabled:
        return None
    return Reading(size == 0, f"{size:.0f} groups left to recover")


class RecoveryUnused:
    def __init__(self) -> None:
        self._waiting = self._recovered = None

    def __call__(self, row: Row, stage: StageConfig) -> Reading | None:
        waited, before = self._waiting, self._recovered
        self._waiting, self._recovered = number(row, "recovery/size"), number(row, "ledger/recovered")
        if not stage.recovery.enabled or None in (waited, before, self._recovered):
            return None
        used = self._recovered - before
        return Reading(waited > 0 and used == 0, f"{used:.0f} of {waited:.0f} waiting groups trained on")


def mismatch(row: Row, _stage: StageConfig) -> Reading | None:
    if "mismatch/mean_bound" not in row:
        return None
    outside = bool(number(row, "mismatch/alarm"))
    return Reading(outside, alarm_text(row) if outside else calm_text(row))
