"""The tables `[[train_step]]` of benchmarks/gates.toml: what they say, and whether they hold for what was measured.

    [[train_step]]
    name, device ("cpu", "hopper"), architecture, context, dtype
    metric      one of METRICS
    at_least or at_most   the limit

Judged is the configuration as it was asked for, the first way of a comparison.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.kernels.gates import DEVICES
from rollout.errors import InputError

METRICS = {
    "mfu": "model FLOPs of the update over its seconds and the GEMM rate of the same rounds",
    "hfu": "FLOPs done by the update over the same",
    "head_share": "the loss head's share of a step's seconds, score and update",
    "memory_ratio": "planned memory of the update over measured memory",
}
SECTION = "train_step"


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    device: str
    architecture: str
    context: int
    dtype: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """text: the figure and its limit."""

    line: Line
    held: bool
    text: str


def read(path: Path) -> list[Line]:
    """Raises InputError for a file, key or value that is none."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get(SECTION, [])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no TOML ({error})") from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{path}: {SECTION}: expected [[{SECTION}]] tables")
    places = (f"{path}: {SECTION} {number} ({table.get('name', 'without a name')})" for number, table in enumerate(tables, 1))
    return [_line(place, table) for place, table in zip(places, tables, strict=True)]


def _line(place: str, table: Mapping[str, Any]) -> Line:
    keys = [field.name for field in fields(Line)]
    for key, value in table.items():
        if key not in keys:
            raise InputError(f"{place}: unknown key {key!r}; the keys are {', '.join(keys)}")
        wanted = int if key == "context" else (int, float) if key.startswith("at_") else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise InputError(f"{place}: {key}: {value!r} is of the wrong type")
    for key in keys[:6]:
        if key not in table:
            raise InputError(f"{place}: {key} is missing; add it")
    for key, known in (("device", DEVICES), ("metric", METRICS)):
        if table[key] not in known:
            raise InputError(f"{place}: {key}: {table[key]!r} is none of {', '.join(known)}")
    if ("at_least" in table) == ("at_most" in table):
        raise InputError(f"{place}: at_least, at_most: expected one of them")
    return Line(**table)


def chosen(lines: Sequence[Line], device: str | None, architecture: str, context: int, dtype: str) -> list[Line]:
    """Those of this measurement. Raises InputError where there is none: a gate that checks nothing is none."""
    found = [
        line
        for line in lines
        if (line.device, line.architecture, line.context, line.dtype) == (device, architecture, context, dtype)
    ]
    if not found:
        known = {f"{one.architecture} --context {one.context} --dtype {one.dtype} on {one.device}" for one in lines}
        there = "; ".join(sorted(known))
        raise InputError(f"--gate: gates.toml has no line for this measurement; it has {there or 'none'}")
    return found


def judge(line: Line, metrics: Mapping[str, float | None]) -> Judged:
    """What was not measured holds no limit, nor does NaN."""
    value = metrics.get(line.metric)
    limit = line.at_least if line.at_least is not None else line.at_most
    sign = "≥" if line.at_least is not None else "≤"
    if value is None:
        return Judged(line, False, f"{line.metric} was not measured, must be {sign} {limit:g}")
    held = value >= limit if line.at_least is not None else value <= limit
    return Judged(line, held, f"{line.metric} {value:.3f}{'' if held else ', must be'} {sign} {limit:g}")
