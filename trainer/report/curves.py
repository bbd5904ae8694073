"""From a run's folder to what its curves, ledger, times and alarms are drawn from, as JSON can hold it."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rollout.errors import InputError
from trainer.config_guards import ALARMS
from trainer.metrics import LEDGER_FATES, METRICS_FILE, number, read_metrics
from trainer.plot_data import PHASE_NAMES, column, evaluation_series, phase_seconds, smoothing_window, stage_bands, stage_names
from trainer.summary import SUMMARY_FILE

DIGITS = 6
"""That a value keeps: more than a screen shows, and a third of the bytes."""


def read_run(run: Path, name: str) -> dict[str, Any]:
    """The run as the page draws it. Raises InputError where it has no metrics or no finished step."""
    rows = read_metrics(run)
    train = sorted((row for row in rows if row["kind"] == "train"), key=lambda row: row["step"])
    evals = sorted((row for row in rows if row["kind"] == "eval"), key=lambda row: row["step"])
    if not train:
        raise InputError(f"{run / METRICS_FILE}: no finished step, so there is nothing to show; wait for the first train row")
    steps, drawn = column(train, "step"), column(train, "ledger/drawn")
    return {
        "name": name,
        "about": read_about(run),
        "steps": [row["step"] for row in train],
        "drawn": rounded(drawn) if np.isfinite(drawn).all() else None,
        "smoothing": smoothing_window(len(train)),
        "bands": [
            {
                "stage": band.stage,
                "names": [*stage_names(band), f"stage {band.stage + 1}"],
                "first": band.first,
                "last": band.last,
            }
            for band in stage_bands(train)
        ],
        "columns": numeric_columns(train),
        "evaluations": [
            {
                "name": series.name or "evaluation",
                "steps": rounded(series.steps),
                "drawn": rounded(series.drawn),
                "values": rounded(series.pass_at_1),
            }
            for series in evaluation_series(evals, steps, drawn)
        ],
        "seconds": {PHASE_NAMES[phase]: rounded(values) for phase, values in phase_seconds(train, evals).items()},
        "ledger": read_ledger(train[-1]),
        "alarms": alarm_spans(train),
        "skipped": [[row["step"], int(count)] for row in train if (count := number(row, "guard/skipped"))],
    }


def read_about(run: Path) -> dict[str, str]:
    """What is known of the run besides its metrics: model from config.yaml, machine and commit from summary.json. A file that is
    missing or of another kind adds nothing; the run may have ended before it was written."""
    about = {}
    config, summary = _load(run / "config.yaml", yaml.safe_load), _load(run / SUMMARY_FILE, json.loads)
    model, machine = config.get("model"), summary.get("machine")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        about["model"] = model["path"]
    if isinstance(machine, dict):
        about |= {key: str(machine[key]) for key in ("date", "commit", "cpu", "cores", "torch") if key in machine}
    return about


def numeric_columns(train: list[dict]) -> dict[str, list[float | None]]:
    """Every number of the rows by key, null where a row lacks it; times apart, which `seconds` has, and alarms."""
    keys = dict.fromkeys(key for row in train for key in row if not key.startswith(("time/", "alarm/")) and key != "step")
    columns = {key: column(train, key) for key in keys}
    return {key: rounded(values) for key, values in columns.items() if np.isfinite(values).any()}


def read_ledger(row: dict) -> dict[str, int] | None:
    """Prompts drawn, and by fate, after the row's step; None where it keeps no ledger."""
    counts = {fate: number(row, f"ledger/{fate}") for fate in ("drawn", *LEDGER_FATES)}
    known = {fate: int(count) for fate, count in counts.items() if count is not None}
    return known if "drawn" in known else None


def alarm_spans(train: list[dict]) -> list[dict[str, Any]]:
    """Of each alarm that any row speaks of: {name, spans: [[first step, last step], …] in which it lasted}."""
    found = []
    for name in ALARMS:
        key = f"alarm/{name}"
        if not any(key in row for row in train):
            continue
        runs = groupby(train, key=lambda row, key=key: bool(number(row, key)))
        steps = [[row["step"] for row in rows] for lasts, rows in runs if lasts]
        found.append({"name": name, "spans": [[each[0], each[-1]] for each in steps]})
    return found


def rounded(values: np.ndarray) -> list[float | None]:
    """To DIGITS significant digits, NaN as null, whole numbers without a point."""
    return [_short(value) if math.isfinite(value) else None for value in values.tolist()]


def _short(value: float) -> float:
    return int(value) if value == int(value) and abs(value) < 2**53 else float(f"{value:.{DIGITS}g}")


def _load(path: Path, parse: Any) -> dict:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
