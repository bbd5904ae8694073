"""Measurements made up, for tests of what is done with them."""

from __future__ import annotations

from benchmarks.kernels.cases import BOTH, Case
from benchmarks.kernels.gates import Gate
from benchmarks.kernels.results import CaseResult, Measurement
from benchmarks.kernels.timing import Spread

CASE = Case("logprob_entropy", BOTH, 512, 1024)
NAMES = ["keju", "torch eager", "torch.compile", "peer A", "peer B"]


def measured(name: str, milliseconds: float | None, kind: str = "torch", **more) -> Measurement:
    spread = None if milliseconds is None else Spread(milliseconds, milliseconds, milliseconds, 5)
    return Measurement(name, "keju" if name.startswith("keju") else kind, "1.0", "loss", milliseconds=spread, **more)


def result(*measurements: Measurement, case: Case = CASE, **more) -> CaseResult:
    return CaseResult(case, measurements, **more)


def gate(metric: str = "speedup", case: Case = CASE, **more) -> Gate:
    more.setdefault("at_least", None if "at_most" in more else 4.0)
    if metric == "speedup":
        more.setdefault("baseline", "torch eager")
    return Gate("a line", "cpu", case, metric, **more)
