"""Who keeps the others waiting: from what each rank last said of itself and what the system says of its process. Pure but for
`inspect`, which asks the system.

A rank is behind when its sequence number is lower than the others': all count the same things in the same order, and a rank that
waits in a collective has counted it already. A process that is dead or frozen is the culprit whatever the numbers say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from rollout import process
from rollout.cli import EXIT_INPUT

QUIET_SECONDS = 10.0
"""A rank whose watch has published nothing for so long does not run Python any more."""
_COLLECTIVE_FILES = re.compile(r"torch/distributed/|rollout/ranks\.py")
_THREAD = re.compile(r"^(?=(?:Current thread|Thread) 0x[0-9a-f]+)", re.MULTILINE)
_OWN_FILES = re.compile(r"trainer/(watch|report_writer)\.py|rollout/(deadline|run_lock)\.py\", line \d+ in _(watch|post|beat)\b")
"""Of threads that watch, and tell nothing."""
_IMPORT_FRAME = re.compile(r'^  File "<frozen importlib.*\n', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Health:
    """What a rank says of itself once a second. born: `rollout.process.birth`; waits: the collective or the deadline that it is
    in; silent: seconds since its last beat, when it said so; said: then, on time.monotonic() of its host; launches: what
    started it and the ranks that it has met (`trainer.launch.launch_name`); space: where its pid means it
    (`rollout.process.space`); held: as in `rollout.pulse.Pulse`. end: "" while it runs; code: then its exit code; why: then the
    line that it ended with, where it was no defect."""

    rank: int
    host: str
    pid: int
    born: int
    step: int = 0
    phase: str = "start"
    place: str = ""
    waits: str = ""
    sequence: int = 0
    silent: float = 0.0
    said: float = 0.0
    launches: Sequence[str] = ()
    space: str = ""
    held: int = 0
    end: str = ""
    code: int = 0
    why: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Health:
        return cls(**json.loads(text))

    @property
    def of_its_own(self) -> bool:
        """Whether it ended for what only a person can mend, or must look at."""
        return self.code == EXIT_INPUT or self.end == "ended: RunStopped"

    def beside(self, other: Health) -> bool:
        """Whether each can look at the other's process."""
        return (self.host, self.space) == (other.host, other.space)

    @property
    def who(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank as the report sees it. state: Linux's letter, None for a process that is gone, "?" on another host; quiet: seconds
    since it last said anything."""

    health: Health
    state: str | None = "?"
    quiet: float = 0.0
    wait: str = ""
    stack: str = field(default="", repr=False)

    @property
    def silent(self) -> float:
        """Seconds since its last beat, now."""
        return self.health.silent + self.quiet

    @property
    def dead(self) -> bool:
        return self.state in (None, "Z", "X")

    @property
    def frozen(self) -> bool:
        return self.state in ("T", "t")

    @property
    def mute(self) -> bool:
        """It lives, and not even its watch gets a turn."""
        return not self.dead and not self.frozen and self.quiet > QUIET_SECONDS


def inspect(health: Health, own: Health, now: float) -> Seen:
    """Asks the system, where the rank is on this host. own: of the process that asks; now: time.monotonic()."""
    if not health.beside(own):
        return Seen(health)
    state = process.state(health.pid) if health.born == 0 or process.birth(health.pid) == health.born else None
    return Seen(health, state, max(0.0, now - health.said), process.kernel_wait(health.pid))


def culprits(ranks: Sequence[Seen]) -> tuple[list[Seen], str]:
    """(those that the others wait for, how that is known). With nothing to tell them apart, the one that was silent longest."""
    running = [each for each in ranks if not each.health.end]
    for found in (
        [each for each in running if each.dead],
        [each for each in running if each.frozen],
        [each for each in running if each.mute],
    ):
        if found:
            return found, ""
    if not running:
        return [min(ranks, key=lambda each: each.health.sequence)], ""
    first = max(each.health.sequence for each in running)
    last = min(each.health.sequence for each in running)
    if last < first:
        return [each for each in running if each.health.sequence == last], ""
    outside = [each for each in running if each.stack and not waits_in_collective(each.stack)]
    if outside and len(outside) < len(running):
        return outside, "it alone waits in no collective" if len(outside) == 1 else "they wait in no collective"
    only = max(running, key=lambda each: each.silent)
    return [only], "" if len(running) == 1 else "no rank is behind another: their stacks below must tell"


def waits_in_collective(stack: str) -> bool:
    """Whether the main thread stands in torch.distributed or in a collective of ours."""
    return bool(_COLLECTIVE_FILES.search(main_thread(stack)))


def main_thread(stack: str) -> str:
    """faulthandler lists the main thread last."""
    return _THREAD.split(stack)[-1]


def readable(stack: str) -> str:
    """The main thread first, without the threads that watch and the frames of the import machinery."""
    *others, main = _THREAD.split(_IMPORT_FRAME.sub("", stack))
    return "\n\n".join(
        text for each in [main, *others] if (text := each.strip()) and (each is main or not _OWN_FILES.search(each))
    )


def sentence(ranks: Sequence[Seen]) -> str:
    """The first line: who, where, and what is the matter."""
    found, how = culprits(ranks)
    one, first = found[0], max(each.health.sequence for each in ranks)
    health = one.health
    parts = [f"in {health.phase!r}"]
    parts += [f"step {health.step}"] if health.step else []
    parts += [health.place] if health.place else []
    parts += [f"waiting in {health.waits}"] if health.waits else []
    parts.append(f"sequence {health.sequence}")
    if behind := first - health.sequence:
        parts.append(f"behind the others by {behind}")
    parts.append(f"silent for {one.silent:.0f} s")
    text = f"{health.who}: {', '.join(parts)}: {condition(one)}"
    if len(found) > 1:
        text += f"; likewise {', '.join(f'rank {each.health.rank}' for each in found[1:])}"
    return f"{text} ({how})" if how else text


def condition(seen: Seen) -> str:
    if seen.dead:
        return "its process is gone"
    if seen.mute:
        return f"alive, and no Python thread of it had a turn for {seen.quiet:.0f} s (native code holds the interpreter)"
    text = process.STATES.get(seen.state, "on another host, its state unknown" if seen.state == "?" else f"state {seen.state}")
    return f"{text} in the kernel's {seen.wait}" if seen.wait and not seen.frozen else text


def report(ranks: Sequence[Seen], size: int, why: str, when: str) -> str:
    """The whole text: the sentence, who raised the alarm, a table of the ranks, their stacks. size: how many ranks there should
    be."""
    rows = [("rank", "host", "pid", "state", "step", "phase", "at", "waits for", "sequence", "silent")]
    for each in ranks:
        health = each.health
        state = "ended" if health.end else "gone" if each.dead else each.state
        silent = f"{each.silent:.0f} s"
        rows.append((f"{health.rank}", health.host, f"{health.pid}", state, f"{health.step}", health.phase, health.place or "-",
                     health.waits or "-", f"{health.sequence}", silent))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    stacks = []
    for each in ranks:
        words = readable(each.stack) or f"no stack came ({'it has ended' if each.health.end else condition(each)})"
        stacks.append(f"Stack of {each.health.who}, its main thread first, the innermost call first:\n\n{words}")
    known = {each.health.rank for each in ranks}
    table += [f"{rank:<{widths[0]}}  has not said anything yet" for rank in range(size) if rank not in known]
    return "\n\n".join([sentence(ranks), f"Alarm of {when}: {why}", "\n".join(table), *stacks]) + "\n"


def with_stack(seen: Seen, stack: str) -> Seen:
    return replace(seen, stack=stack)
