"""What a run prints and writes: a table a case, the gates' verdicts, and one JSON file."""

from __future__ import annotations

import datetime
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernels.cases import Case, bytes_to_move, operations_to_do
from benchmarks.kernels.gates import Verdict
from benchmarks.kernels.results import CaseResult, Measurement, as_json, throughput
from trainer import environment

HEADERS = ("contender", "ms", "p10–p90", "× keju", "rate", "of floor", "memory", "error (logprob H d)", "returns")


def case_table(result: CaseResult) -> str:
    """One case as text: contenders from fast to slow, then those that did not run, with their reasons."""
    title = result.case.name
    if result.skipped is not None:
        return f"{title}\n  skipped: {result.skipped}"
    title += f"   [{_floor_text(result)}]" if result.floor_ms is not None else ""
    ran = sorted((one for one in result.measurements if one.milliseconds), key=lambda one: one.milliseconds.median)
    keju = result.of("keju")
    ours = keju.milliseconds.median if keju and keju.milliseconds else None
    rows = [_row(result, one, ours) for one in ran]
    return "\n".join([title, *table(HEADERS, rows), *_left_out(result.measurements)])


def _left_out(measurements: Sequence[Measurement]) -> list[str]:
    """Who was not timed, and why: those with the same reason on one line."""
    reasons: dict[str, list[str]] = {}
    for one in measurements:
        if one.reason is not None:
            reasons.setdefault(one.reason, []).append(_name(one))
    return [f"  {reason}: {'; '.join(names)}" for reason, names in reasons.items()]


def _row(result: CaseResult, one: Measurement, ours: float | None) -> tuple[str, ...]:
    assert one.milliseconds is not None
    time, share = one.milliseconds, result.fraction_of_floor(one)
    gradient = max((error for name, error in one.errors.items() if name.startswith("d_")), default=None)
    errors = (one.errors.get("logprob"), one.errors.get("entropy"), gradient)
    memory = "–" if one.extra_bytes is None else size(one.extra_bytes)
    return (
        _name(one),
        milliseconds(time.median),
        f"{milliseconds(time.p10)}–{milliseconds(time.p90)}",
        f"{time.median / ours:.2f}" if ours else "–",
        throughput(result.case, time.median),
        "–" if share is None else f"{share:.0%}",
        memory,
        " ".join("–" if error is None else f"{error:.0e}" for error in errors),
        one.returns,
    )


def _name(one: Measurement) -> str:
    return f"{one.contender} {one.version}" if one.kind == "peer" and one.version != "not installed" else one.contender


def _floor_text(result: CaseResult) -> str:
    if result.copy_bandwidth is not None:
        moved = bytes_to_move(result.case) or 0
        return f"floor {result.floor_ms:.3g} ms: {size(moved)} at a copy's {result.copy_bandwidth / 1e9:,.0f} GB/s"
    return f"floor {result.floor_ms:.4g} ms: {(operations_to_do(result.case) or 0) / 1e9:,.4g} GFLOP in the library's GEMMs"


def milliseconds(time: float) -> str:
    return f"{time:.3g}" if time < 100 else f"{time:.0f}"


def size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, each line indented by two."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (headers, *rows)
    ]


def gate_lines(verdicts: Sequence[Verdict]) -> list[str]:
    marks = {"held": "held  ", "broken": "BROKEN", "not judged": "–     "}
    lines = []
    for verdict in verdicts:
        again = f" (measured {verdict.attempts} times)" if verdict.attempts > 1 else ""
        lines.append(f"{marks[verdict.state]} {verdict.gate.name} [{verdict.gate.case.name}]: {verdict.text}{again}")
    return lines


def write(
    path: Path, results: Sequence[CaseResult], device: dict[str, object], command: str, verdicts: Sequence[Verdict] = (),
    static: Sequence[dict[str, object]] = (),
) -> None:  # fmt: skip
    """The whole run as JSON, written beside and renamed, so that a run stopped halfway leaves its last state."""
    record = {
        "command": command,
        "machine": device,
        "formulas": {
            "milliseconds": "median, 10 % and 90 % quantiles over rounds in which all contenders ran in turn",
            "bytes_to_move": "forward T·V·b; backward 2·T·V·b; both 3·T·V·b; b bytes a logit; plus per-token values",
            "operations_to_do": "GEMMs · 2·T·V·D; 1 forward, 3 where the arriving gradient is known in it, else 4",
            "floor_ms": "bytes_to_move over a copy's bandwidth in the same rounds, or the sum of the library's fastest GEMMs",
            "errors": "against fp64: logprob and entropy largest absolute difference in nats, others relative in norm",
            "memory": "extra_bytes: peak beyond the inputs; returned_bytes: gradients and outputs, which are part of it",
        },
        "gates": [{**asdict(verdict), "case": verdict.gate.case.name} for verdict in verdicts],
        "static": list(static),
        "cases": [as_json(result) for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    beside.replace(path)


def machine(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """What was measured on and with."""
    names = ("torch", "triton", "numpy")
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or environment.commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        **{name: environment.version_of(name) for name in names},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
        }
    else:
        found |= {"threads": torch.get_num_threads(), "vector_unit": torch.backends.cpu.get_cpu_capability()}
    return found


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{environment.cpu_model()}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A file name's part: lower case, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def by_case(results: Sequence[CaseResult]) -> dict[Case, CaseResult]:
    return {result.case: result for result in results}
