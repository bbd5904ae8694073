"""--tune: launch configurations of the Triton row kernels, timed in turn on the GPU at hand beside a copy of as many bytes.

Changes nothing: it prints which (num_warps, vectors a lane) is fastest and where the one in kernels/triton_rows.py stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernels import floor, report
from benchmarks.kernels.cases import BACKWARD, FORWARD, Case, bytes_to_move
from benchmarks.kernels.inputs import Inputs, make_inputs
from benchmarks.kernels.timing import Spread, Timed, clock_for, interleave
from rollout.errors import InputError

TOKENS, VOCABULARY = 8192, 152_064
CONFIGURATIONS = [(warps, vectors) for warps in (4, 8, 16, 32) for vectors in (1, 2, 4) if warps * vectors <= 32]
HEADERS = ("kernel", "warps", "vectors", "ms", "p10–p90", "GB/s", "of a copy", "")
SECONDS = 3.0
Shape = tuple[int, int]


def tune(device: torch.device, out: Path | None) -> int:
    """Raises InputError where there is no CUDA device."""
    if device.type != "cuda":
        raise InputError("--tune: needs a CUDA device; launch configurations mean nothing on a CPU")
    record = []
    for dtype in ("bfloat16", "float32"):
        inputs = make_inputs(Case("logprob_entropy", FORWARD, TOKENS, VOCABULARY, dtype=dtype), device)
        for mode in (FORWARD, BACKWARD):
            case = Case("logprob_entropy", mode, TOKENS, VOCABULARY, dtype=dtype)
            times, failed = _sweep(case, inputs)
            copy = times.pop(floor.COPY)
            print("\n".join([case.name, *report.table(HEADERS, _rows(case, times, copy)), *failed]), flush=True)
            record.append(
                {
                    "case": asdict(case),
                    "copy": asdict(copy),
                    "milliseconds": {
                        f"{warps} warps, {vectors} vectors": asdict(time) for (warps, vectors), time in times.items()
                    },
                    "failed": failed,
                }
            )
            write(record, device, out)  # after each: a command that is cut short keeps what it has measured
        del inputs
        torch.cuda.empty_cache()
    return 0


def write(record: list[dict], device: torch.device, out: Path | None) -> None:
    if out is not None:
        file = out / f"kernels-tune-{report.slug(report.device_name(device))}.json"
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": report.machine(device), "sweeps": record}, indent=1) + "\n", encoding="utf-8")


def current() -> Shape:
    """What the kernels run with."""
    from kernels import triton_rows

    return triton_rows.WARPS, triton_rows.VECTORS


def _sweep(case: Case, inputs: Inputs) -> tuple[dict, list[str]]:
    """Times by (warps, vectors), the copy's under its name; and the configurations that failed, in words."""
    timed: dict = {floor.COPY: floor.timed_floors(case, inputs)[floor.COPY]}
    failed = []
    expected = None
    for shape in sorted({*CONFIGURATIONS, current()}):
        try:
            run = _call(case, inputs, shape)
            result = run()
            expected = result if expected is None else expected
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=2e-2)
        except Exception as error:  # a configuration may not compile or not fit: that is the finding
            failed.append(failure(shape, error))
            continue
        timed[shape] = Timed(run)
    timings = interleave(timed, clock_for(inputs.device), SECONDS)
    return dict(timings.spreads), failed + [failure(shape, error) for shape, error in timings.failures.items()]


def failure(shape: Shape, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"  {shape[0]} warps, {shape[1]} vectors: {type(error).__name__}: {first[:120]}"


def _call(case: Case, inputs: Inputs, shape: Shape) -> Callable[[], torch.Tensor]:
    """The launcher with that shape; returns what it computed, so that configurations can be compared."""
    from kernels import triton_rows

    options = triton_rows.tile_shape(case.torch_dtype, *shape)
    temperature = torch.ones(1, device=inputs.device)
    if case.mode == FORWARD:
        return lambda: triton_rows.forward(inputs.logits_TV, inputs.labels_T, temperature, **options)[0]
    logprob_T, _, saved_3T = triton_rows.forward(inputs.logits_TV, inputs.labels_T, temperature)
    d_logits_TV = torch.empty_like(inputs.logits_TV)

    def backward() -> torch.Tensor:
        arguments = (logprob_T, saved_3T, inputs.d_logprob_T, inputs.d_entropy_T, d_logits_TV)
        triton_rows.backward(inputs.logits_TV, inputs.labels_T, temperature, *arguments, **options)
        return d_logits_TV[:16].clone()

    return backward


def _rows(case: Case, times: dict[Shape, Spread], copy: Spread) -> list[tuple[str, ...]]:
    """From fast to slow."""
    moved, bandwidth = bytes_to_move(case) or 0, floor.bandwidth(case, copy.median)
    rows = []
    for (warps, vectors), time in sorted(times.items(), key=lambda item: item[1].median):
        rate = 1000 * moved / time.median
        note = "in use" if (warps, vectors) == current() else ""
        spread = f"{time.p10:.3g}–{time.p90:.3g}"
        rows.append(
            (
                case.mode,
                str(warps),
                str(vectors),
                f"{time.median:.3f}",
                spread,
                f"{rate / 1e9:,.0f}",
                f"{rate / bandwidth:.1%}",
                note,
            )
        )
    return rows
