"""Measures a case: every contender called once and compared with fp64, then all timed in turn, then their memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernels import floor, memory
from benchmarks.kernels.cases import Case, input_bytes
from benchmarks.kernels.contender import Contender, Gradient, Prepared
from benchmarks.kernels.inputs import Inputs, make_inputs
from benchmarks.kernels.results import CaseResult, Measurement
from benchmarks.kernels.timing import Clock, Timed, clock_for, interleave
from benchmarks.kernels.truth import Truth, wrong


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured. seconds: of timing for a case. memory: whose peak memory, by kind of contender. compiling: seconds
    that torch.compile may take in all."""

    seconds: float
    memory: frozenset[str] = frozenset({"keju", "torch", "peer"})
    compiling: float = 60.0


class Suite:
    """Runs cases on a device, one after the other, keeping the inputs of a shape for its modes."""

    def __init__(self, device: torch.device, contenders: Sequence[Contender], effort: Effort) -> None:
        self.device, self._contenders, self._effort = device, contenders, effort
        self._clock: Clock = clock_for(device)
        self._inputs: Inputs | None = None
        self._truth: Truth | None = None
        self._compiling = 0.0

    def run(
        self, wanted: Mapping[Case, frozenset[str]], deadline: float, report: Callable[[list[CaseResult]], None]
    ) -> list[CaseResult]:
        """Cases in order, each with the names of the contenders that run (all where empty), until the deadline (time.monotonic);
        what is not reached is listed as such. report: gets all results so far, after each case."""
        results: list[CaseResult] = []
        for case, names in wanted.items():
            late = time.monotonic() > deadline
            results.append(CaseResult(case, skipped="not reached: the time was up") if late else self.measure(case, names))
            report(results)
        return results

    def measure(self, case: Case, names: frozenset[str] = frozenset()) -> CaseResult:
        """One case; names: of the contenders that run, all where empty. What goes wrong outside of them skips the case."""
        try:
            return self._measure(case, names)
        except Exception as error:  # one case must not end a run
            self._forget()
            return CaseResult(case, skipped=_in_words(error))

    def _measure(self, case: Case, names: frozenset[str]) -> CaseResult:
        offering = [one for one in self._contenders if one.offers(case) and (not names or one.name in names)]
        needed, free = 2 * input_bytes(case), free_bytes(self.device)
        if needed > free:
            self._forget()
            free = free_bytes(self.device)
        if needed > free:
            return CaseResult(case, skipped=f"needs {needed / 2**30:.1f} GiB for its inputs, {free / 2**30:.1f} GiB are free")
        inputs, truth = self._prepare_inputs(case)
        listed: dict[str, Measurement] = {}
        ready: dict[str, Prepared] = {}
        for contender in offering:
            listed[contender.name], prepared = self._try(contender, case, inputs, truth)
            if prepared is not None:
                ready[contender.name] = prepared
        floors = floor.timed_floors(case, inputs)
        timed = {name: Timed(one.run, one.before) for name, one in ready.items()} | floors
        timings = interleave(timed, self._clock, self._effort.seconds, at_least=3 if case.is_linear else 5)
        spreads = timings.spreads
        for name in list(ready):
            if name in spreads:
                listed[name] = replace(listed[name], milliseconds=spreads[name])
            else:
                listed[name] = replace(listed[name], reason=_in_words(timings.failures[name]))
                del ready[name]
        measured_floors = {name: spreads[name] for name in floors if name in spreads}
        self._add_memory(case, inputs, {name: ready[name] for name in ready if listed[name].kind in self._effort.memory}, listed)
        copied = measured_floors.get(floor.COPY)
        return CaseResult(
            case=case,
            measurements=tuple(listed.values()),
            floors=measured_floors,
            floor_ms=floor.floor_milliseconds(case, measured_floors),
            copy_bandwidth=floor.bandwidth(case, copied.median) if copied else None,
            fp32_errors=truth.fp32_errors() if case.takes_logits or case.is_linear else {},
        )

    def _prepare_inputs(self, case: Case) -> tuple[Inputs, Truth]:
        if self._inputs is None or self._truth is None or self._inputs.case != case.workload():
            self._forget()
            self._inputs = make_inputs(case, self.device)
            self._truth = Truth(self._inputs)
        return self._inputs, self._truth

    def _forget(self) -> None:
        """One shape's tensors go before the next one's come."""
        self._inputs = self._truth = None
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _try(self, contender: Contender, case: Case, inputs: Inputs, truth: Truth) -> tuple[Measurement, Prepared | None]:
        """The first call, whose outputs are compared; a contender that cannot, or is wrong, is listed with the reason."""
        entry = Measurement(contender.name, contender.kind, contender.version(), contender.returns(case))
        reason = contender.unavailable(case, self.device)
        needed, free = contender.working_bytes(case), free_bytes(self.device)
        if reason is None and needed > free:
            reason = f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
        compiles = contender.name == "torch.compile"
        if reason is None and compiles and self._compiling > self._effort.compiling:
            reason = f"the {self._effort.compiling:.0f} s for compiling are spent"
        if reason is not None:
            return replace(entry, reason=reason), None
        start = time.monotonic()
        try:
            prepared = contender.prepare(case, inputs)
            if prepared.before is not None:
                prepared.before()
            outputs = prepared.run()
            gradient = contender.gradient(case) if case.with_gradient else Gradient.NONE
            errors = truth.errors(outputs, gradient)
        except Exception as error:  # a peer may fail in any way; which way is what is listed
            return replace(entry, reason=_in_words(error)), None
        finally:
            self._compiling += time.monotonic() - start if compiles else 0
        reason = wrong(errors, case.dtype)
        entry = replace(entry, errors=errors, reason=reason)
        return entry, prepared if reason is None else None

    def _add_memory(self, case: Case, inputs: Inputs, ready: dict[str, Prepared], listed: dict[str, Measurement]) -> None:
        if case.operation == "repetition" or not ready:
            return
        if self.device.type == "cuda":
            found = [self._cuda_memory(one, inputs) for one in ready.values()]
        else:
            found = memory.measure_cpu([(case, name) for name in ready])
        for name, one in zip(ready, found, strict=True):
            if isinstance(one, str):
                listed[name] = replace(listed[name], memory_note=one)
            else:
                listed[name] = replace(listed[name], extra_bytes=one.extra, returned_bytes=one.returned)

    @staticmethod
    def _cuda_memory(prepared: Prepared, inputs: Inputs) -> memory.Memory | str:
        try:
            return memory.measure_cuda(prepared, inputs)
        except Exception as error:
            return _in_words(error)


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo: no MemAvailable")


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"fails: {type(error).__name__}: {lines[0][:160] if lines else ''}"
