"""What a person sees of a running training, as pure functions of one frozen `State`.

`render` gives the live view and `step_line`, `evaluation_line`, `phase_line` the lines of a log file; `trainer.console` owns the
terminal, the clock and the refreshing. Every metric may be absent or null: its place then shows "–".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.metrics import LEDGER_FATES, number

NOTES_SHOWN = 4
ENTROPIES_SHOWN = 30
PACE_STEPS = 20  # the pace is the median of so many last steps: one slow step (a checkpoint, an evaluation) does not move it
ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step under way. total: units in all, None where unknown; started: seconds on the clock of State.now."""

    name: str
    total: int | None
    unit: str
    started: float
    done: int = 0
    facts: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class State:
    """All that a view shows. stages: (index, name, steps) in order; started, now: seconds on one monotonic clock;
    step_seconds and entropies: of the last steps, oldest first; row: the last train row; evaluations: the last row of each
    set."""

    total_steps: int
    stages: tuple[tuple[int, str, int], ...]
    started: float = 0.0
    now: float = 0.0
    finished: int = 0
    row: dict = field(default_factory=dict)
    entropies: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    phase: Phase | None = None
    evaluations: dict[str, dict] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()
    """A line for each that lasts."""


def render(state: State) -> RenderableType:
    """The live view: a panel of one line a subject, readable from 80 columns."""
    lines = Table.grid(padding=(0, 1), expand=True)
    lines.add_column(style="cyan", no_wrap=True, min_width=9)
    lines.add_column(ratio=1)
    lines.add_row("run", _run(state))
    lines.add_row(*_phase(state))
    if state.row:
        lines.add_row("entropy", _entropy(state))
        lines.add_row("reward", _reward(state.row))
        lines.add_row("length", _length(state.row))
        lines.add_row("drawn", _drawn(state.row))
        lines.add_row("ledger", _ledger(state.row))
    else:
        lines.add_row("step", Text("the first is under way", style="dim"))
    for row in state.evaluations.values():
        lines.add_row("eval", Text(evaluation_text(row)))
    for line in state.alarms:
        lines.add_row(Text("ALARM", style="bold red"), Text(line, style="red"))
    notes = [Text(f"· {note}", style="dim", no_wrap=True, overflow="ellipsis") for note in state.notes[-NOTES_SHOWN:]]
    return Panel(Group(lines, *notes), title=_title(state), title_align="left", border_style="dim")


def stage_at(stages: Sequence[tuple[int, str, int]], step: int) -> tuple[int, int]:
    """Where step number `step` (from 1) falls: its place in `stages`, and how many steps of that stage come after it.

    A step past the last stage counts into the last. Example: stages of 10 and 20 steps, step 12 → (1, 18).
    """
    end = 0
    for place, (_index, _name, steps) in enumerate(stages):
        end += steps
        if step <= end:
            return place, end - step
    return max(0, len(stages) - 1), 0


def seconds_left(state: State) -> tuple[float, float] | None:
    """Seconds to the end of the stage and of the run, at the median of the last step times; None before the first step.

    A later stage with a longer context is slower than this pace, so the second number is a lower bound before the last stage.
    """
    if not state.step_seconds:
        return None
    pace = median(state.step_seconds[-PACE_STEPS:])
    left = max(0, state.total_steps - state.finished)
    stage_left = left
    if state.stages and left:
        stage_left = min(left, stage_at(state.stages, state.finished + 1)[1] + 1)
    return stage_left * pace, left * pace


def step_line(state: State) -> str:
    """One line for the step just finished, for a log."""
    row, left = state.row, seconds_left(state)
    target = number(row, "entropy/target")
    parts = [
        f"step {state.finished}/{state.total_steps}",
        str(row.get("stage_name", ABSENT)),
        f"reward {_number(row, 'reward/mean', '+.2f')}",
        f"accuracy {_number(row, 'reward/accuracy', '.1%')}",
        f"entropy {_number(row, 'entropy/mean', '.3f')}" + (f" (target {target:.3f})" if target is not None else ""),
        f"length {_number(row, 'length/mean', ',.0f')}",
        f"over-generation {_number(row, 'sampling/over_generation', '.2f')}×",
        f"{_number(row, 'time/step', '.1f')} s",
    ]
    if left is not None:
        parts.append(f"left {clock(left[1])}")
    return " · ".join(parts)


def evaluation_line(row: dict) -> str:
    """One line for an evaluation, for a log."""
    return f"evaluation {evaluation_text(row)}"


def evaluation_text(row: dict) -> str:
    parts = [
        f"{row.get('name', ABSENT)} pass@1 {_number(row, 'pass@1', '.1%')} at step {row.get('step', ABSENT)}",
        f"{_number(row, 'count', ',.0f')} × {_number(row, 'k', '.0f')}",
        f"length {_number(row, 'length/mean', ',.0f')}",
    ]
    if number(row, "truncated") is not None:
        parts.append(f"truncated {_number(row, 'truncated', '.1%')}")
    if number(row, "unjudged") is not None:
        parts.append(f"without a verdict {_number(row, 'unjudged', '.1%')}")
    return " · ".join(parts)


def phase_line(phase: Phase, now: float) -> str:
    """One line for a phase under way: count, rate, time, facts."""
    return " · ".join([f"{phase.name} {_count(phase)}", *_pace(phase, now), *_facts(phase)])


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3725.4 → "1:02:05"."""
    whole = int(max(0.0, seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def sparkline(values: Sequence[float], level: float | None = None) -> str:
    """Values as bars of eight heights, between the least and the greatest of the values and of `level`."""
    if not values:
        return ""
    shown = [*values, level] if level is not None else values
    low, span = min(shown), max(shown) - min(shown)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span) if span else 3] for value in values)


def _title(state: State) -> Text:
    step = min(state.finished + 1, state.total_steps)
    title = Text.assemble((" Keju ", "bold"))
    if state.stages:
        place, _left = stage_at(state.stages, step)
        title.append(f"stage {place + 1} of {len(state.stages)}, {state.stages[place][1]} · ")
    if state.finished >= state.total_steps:
        title.append(f"all {state.total_steps} steps done ")
    else:
        title.append(f"step {step} of {state.total_steps} ")
    return title


def _run(state: State) -> RenderableType:
    left = seconds_left(state)
    words = f"{clock(state.now - state.started)} gone"
    if left is not None:
        words += f" · left {clock(left[0])} stage, {clock(left[1])} run"
    return _bar(state.finished, state.total_steps, words)


def _phase(state: State) -> tuple[str, RenderableType]:
    phase = state.phase
    if phase is None:
        return ABSENT, Text("between phases", style="dim")
    words = " · ".join([_count(phase), *_pace(phase, state.now)])
    bar = _bar(phase.done, phase.total, words) if phase.total else Text(words)
    facts = Text(" · ".join(_facts(phase)), style="dim", no_wrap=True, overflow="ellipsis")
    return phase.name, Group(bar, facts)


def _bar(done: int, total: int, words: str) -> RenderableType:
    # The words have their width and the bar takes what is left, so that a narrow terminal cuts the bar and not a number.
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1, min_width=6)
    line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=max(1, total), completed=min(done, total), complete_style="green", finished_style="green")
    line.add_row(bar, words)
    return line


def _count(phase: Phase) -> str:
    return f"{phase.done:,}/{phase.total:,} {phase.unit}" if phase.total else f"{phase.done:,} {phase.unit}"


def _pace(phase: Phase, now: float) -> list[str]:
    elapsed = max(0.0, now - phase.started)
    rate = [f"{phase.done / elapsed:,.1f}/s"] if phase.done and elapsed > 0 else []
    return [*rate, clock(elapsed)]


def _facts(phase: Phase) -> list[str]:
    return [f"{name}={value:,}" if isinstance(value, int) else f"{name}={value}" for name, value in phase.facts.items()]


def _entropy(state: State) -> Text:
    target = number(state.row, "entropy/target")
    words = Text(_number(state.row, "entropy/mean", ".3f"), style="bold")
    words.append(f"  target {target:.3f}  " if target is not None else "  no target  ", style="not bold")
    return words.append(sparkline(state.entropies[-ENTROPIES_SHOWN:], target), style="magenta")


def _reward(row: dict) -> Text:
    return Text(f"mean {_number(row, 'reward/mean', '+.2f')} · accuracy {_number(row, 'reward/accuracy', '.1%')}")


def _length(row: dict) -> Text:
    text = f"mean {_number(row, 'length/mean', ',.0f')} tokens · longest {_number(row, 'length/max', ',.0f')}"
    return Text(f"{text} · context {_number(row, 'context', ',.0f')} · truncated {_number(row, 'verdict/truncated', '.1%')}")


def _drawn(row: dict) -> Text:
    text = f"{_number(row, 'sampling/over_generation', '.2f')}× the groups trained"
    return Text(f"{text} · in {_number(row, 'sampling/rounds', '.0f')} rounds")


def _ledger(row: dict) -> Text:
    fates = [(fate, number(row, f"ledger/{fate}")) for fate in LEDGER_FATES]
    shown = [f"{fate} {count:,.0f}" for fate, count in fates if count]  # the fates that nothing met would crowd out the others
    return Text(f"{_number(row, 'ledger/drawn', ',.0f')} drawn" + (": " + " · ".join(shown) if shown else ""))


def _number(row: dict, key: str, form: str) -> str:
    value = number(row, key)
    return ABSENT if value is None else format(value, form)
