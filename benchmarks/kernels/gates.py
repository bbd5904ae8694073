"""The lines of benchmarks/gates.toml: what they say, whether they hold, and by how much they do not.

    [[gate]]
    name, device ("cpu", "hopper"), operation, mode, tokens (a number or a list), vocabulary, hidden, dtype
    metric      one of METRICS
    at_least or at_most          the limit; plus is added to an error's limit
    contender   who is judged ("keju"); baseline: whom it is compared with, where the metric compares
    generous    the limit under --generous: for machines whose neighbours disturb

All are ratios of the same run, but for milliseconds and memory. What cannot be judged because something failed is broken; only a
comparison with peers of whom none is installed is left out, and said.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from benchmarks.kernels.cases import Case, check, gradient_bytes
from benchmarks.kernels.results import CaseResult, Measurement
from rollout.errors import InputError

METRICS = {
    "speedup": "the baseline's median over the contender's",
    "speedup_over_fastest_peer": "the fastest installed peer's median over the contender's",
    "share_of_floor": "the floor's time over the contender's: the share of the copy's bandwidth",
    "times_floor": "the contender's time over the floor's: over the GEMMs alone",
    "milliseconds": "the contender's median",
    "memory_over_gradient": "peak memory beyond the inputs, over the gradient's size",
    "memory_beyond_gb": "10⁹ bytes of peak memory beyond the inputs and what is returned",
    "error": "the largest error of `output`, against `at_most` times the baseline's plus `plus`",
}
COMPARING = {"speedup", "error"}
DEVICES = ("cpu", "hopper")
TORCH_FP32 = "torch fp32"
"""The baseline of errors that is not timed: PyTorch's own computation in fp32."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One line for one shape."""

    name: str
    device: str
    case: Case
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    plus: float = 0.0
    contender: str = "keju"
    baseline: str | None = None
    output: str | None = None
    generous: float | None = None

    def lenient(self) -> Gate:
        """With the generous limit in its limit's place."""
        if self.generous is None:
            return self
        return replace(self, **{"at_least" if self.at_least is not None else "at_most": self.generous})

    def contenders(self, peers: Collection[str]) -> set[str]:
        """Who must be measured for it."""
        names = {self.contender} | ({self.baseline} if self.baseline and self.baseline != TORCH_FP32 else set())
        return names | (set(peers) if self.metric == "speedup_over_fastest_peer" else set())


@dataclass(frozen=True, slots=True)
class Verdict:
    """state: held, broken, or not judged. text: the figure, its limit and the distance between them."""

    gate: Gate
    state: str
    text: str
    attempts: int = 1


def read(path: Path, contenders: Collection[str]) -> list[Gate]:
    """Raises InputError for a file, key, value or case that is none; a gate whose tokens are a list becomes one gate each."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is no TOML ({error})") from None
    table.pop("train_step", None)  # benchmarks/train_step/gates.py reads those
    if set(table) != {"gate"} or not isinstance(table["gate"], list):
        raise InputError(f"{path}: expected [[gate]] tables and nothing else, got {', '.join(sorted(table)) or 'nothing'}")
    gates = [
        gate for number, entry in enumerate(table["gate"], 1) for gate in _gates(f"{path}: gate {number}", entry, contenders)
    ]
    seen: set[tuple[str, Case, str]] = set()
    for gate in gates:
        if (gate.name, gate.case, gate.device) in seen:
            raise InputError(f"{path}: name: {gate.name!r} stands twice for {gate.case.name}")
        seen.add((gate.name, gate.case, gate.device))
    return gates


SHAPE = ("operation", "mode", "tokens", "vocabulary", "hidden", "dtype")
PLAIN = tuple(field.name for field in fields(Gate) if field.name != "case")


def _gates(place: str, entry: Mapping[str, object], contenders: Collection[str]) -> list[Gate]:
    place = f"{place} ({entry.get('name', 'without a name')})"
    for key in entry:
        if key not in (*SHAPE, *PLAIN):
            raise InputError(f"{place}: unknown key {key!r}; the keys are {', '.join((*PLAIN, *SHAPE))}")
    for key in ("name", "device", "operation", "mode", "tokens", "metric"):
        if key not in entry:
            raise InputError(f"{place}: {key} is missing")
    for key, value in entry.items():
        if not _fits(key, value):
            raise InputError(f"{place}: {key}: {value!r} is of the wrong type")
    tokens = entry["tokens"] if isinstance(entry["tokens"], list) else [entry["tokens"]]
    shape = {key: entry[key] for key in SHAPE if key in entry}
    plain = {key: entry[key] for key in PLAIN if key in entry}
    gates = [Gate(case=Case(**{**shape, "tokens": count}), **plain) for count in tokens]
    for gate in gates:
        reason = _refusal(gate, contenders)
        if reason is not None:
            raise InputError(f"{place}: {reason}")
    return gates


NUMBERS = ("at_least", "at_most", "plus", "generous")
WHOLE = ("tokens", "vocabulary", "hidden")


def _fits(key: str, value: object) -> bool:
    if key == "tokens" and isinstance(value, list):
        return bool(value) and all(_fits(key, count) for count in value)
    wanted = int if key in WHOLE else (int, float) if key in NUMBERS else str
    return isinstance(value, wanted) and not isinstance(value, bool)


def _refusal(gate: Gate, contenders: Collection[str]) -> str | None:
    if gate.device not in DEVICES:
        return f"device: {gate.device!r} is none of {', '.join(DEVICES)}"
    if gate.metric not in METRICS:
        return f"metric: {gate.metric!r} is none of {', '.join(METRICS)}"
    if (gate.at_least is None) == (gate.at_most is None):
        return "at_least, at_most: expected one of them"
    if (gate.baseline is not None) != (gate.metric in COMPARING):
        return f"baseline: {gate.metric} {'needs one' if gate.metric in COMPARING else 'has none'}"
    if (gate.output is not None) != (gate.metric == "error"):
        return f"output: {gate.metric} {'needs one' if gate.metric == 'error' else 'has none'}"
    for name in (gate.contender, gate.baseline):
        if name is not None and name not in contenders and name != TORCH_FP32:
            return f"there is no contender {name!r}; there are {', '.join(contenders)}"
    reason = check(gate.case)
    return None if reason is None else f"no such case: {reason}"


def judge(gate: Gate, result: CaseResult | None) -> Verdict:
    """Whether the gate holds for what was measured of its case."""
    if result is None:
        return Verdict(gate, "broken", "its case was not measured")
    if result.skipped is not None:
        return Verdict(gate, "broken", f"its case was not measured: {result.skipped}")
    mine = result.of(gate.contender)
    reason = _missing(gate.contender, mine)
    if reason is None and gate.baseline not in (None, TORCH_FP32):
        reason = _missing(gate.baseline, result.of(gate.baseline))
    if reason is not None or mine is None:
        return Verdict(gate, "broken", f"cannot be judged: {reason}")
    if gate.metric == "error":
        return _judge_error(gate, result, mine)
    if gate.metric == "speedup_over_fastest_peer" and not _peers(result):
        return Verdict(gate, "not judged", "no peer could be measured")
    value = _value(gate, result, mine)
    if value is None:
        return Verdict(gate, "broken", f"cannot be judged: {mine.memory_note or 'no figure'}")
    return _compare(gate, value, gate.at_least if gate.at_least is not None else gate.at_most, "")


def _missing(name: str | None, one: Measurement | None) -> str | None:
    if one is None:
        return f"{name} was not measured"
    return None if one.milliseconds is not None else f"{name}: {one.reason}"


def _peers(result: CaseResult) -> dict[str, float]:
    return {one.contender: one.milliseconds.median for one in result.measurements if one.kind == "peer" and one.milliseconds}


def _value(gate: Gate, result: CaseResult, mine: Measurement) -> float | None:
    assert mine.milliseconds is not None
    median, share = mine.milliseconds.median, result.fraction_of_floor(mine)
    if gate.metric == "speedup":
        baseline = result.of(gate.baseline or "")
        return baseline.milliseconds.median / median if baseline and baseline.milliseconds else None
    if gate.metric == "speedup_over_fastest_peer":
        return min(_peers(result).values()) / median
    if gate.metric == "share_of_floor":
        return share
    if gate.metric == "times_floor":
        return None if share is None else 1 / share
    if gate.metric == "milliseconds":
        return median
    if gate.metric == "memory_over_gradient":
        return None if mine.extra_bytes is None else mine.extra_bytes / gradient_bytes(result.case)
    return None if mine.beyond_returned_bytes is None else mine.beyond_returned_bytes / 1e9


def _judge_error(gate: Gate, result: CaseResult, mine: Measurement) -> Verdict:
    theirs = result.fp32_errors if gate.baseline == TORCH_FP32 else result.of(gate.baseline or "").errors  # type: ignore[union-attr]
    output = gate.output or ""
    if output not in mine.errors or output not in theirs:
        return Verdict(gate, "broken", f"cannot be judged: no error of {output!r} for {gate.contender} and {gate.baseline}")
    limit = (gate.at_most or 0.0) * theirs[output] + gate.plus
    return _compare(gate, mine.errors[output], limit, f" = {gate.at_most:g} × {theirs[output]:.3g} + {gate.plus:g}")


def _compare(gate: Gate, value: float, limit: float | None, origin: str) -> Verdict:
    """NaN holds no limit."""
    assert limit is not None
    held = value >= limit if gate.at_least is not None else value <= limit
    sign = "≥" if gate.at_least is not None else "≤"
    text = (
        f"{gate.metric} {value:.4g} {sign} {limit:.4g}{origin}"
        if held
        else f"{gate.metric} {value:.4g}, must be {sign} {limit:.4g}{origin}"
    )
    if not held and limit:
        text += f": off by {abs(value - limit) / abs(limit):.1%}"
    return Verdict(gate, "held" if held else "broken", text)


def judge_all(
    gates: Sequence[Gate],
    results: Mapping[Case, CaseResult],
    remeasure: Callable[[Gate], CaseResult],
    may_retry: Callable[[], bool] = lambda: True,
    retries: int = 2,
) -> list[Verdict]:
    """Judges each gate; a broken one is measured again, on its own, up to `retries` times as long as may_retry says so, and holds
    if one of these holds."""
    verdicts = []
    for gate in gates:
        verdict = judge(gate, results.get(gate.case))
        while verdict.state == "broken" and verdict.attempts <= retries and may_retry():
            verdict = replace(judge(gate, remeasure(gate)), attempts=verdict.attempts + 1)
        verdicts.append(verdict)
    return verdicts
