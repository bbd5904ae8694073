"""The sweep of launch configurations, with launches that are none: what is timed, what failed, and what a cut leaves."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import floor, report, tune
from benchmarks.kernels.cases import FORWARD, Case
from benchmarks.kernels.inputs import make_inputs
from rollout.errors import InputError

CPU = torch.device("cpu")
CASE = Case("logprob_entropy", FORWARD, 8, 50, dtype="float32")


@pytest.fixture
def launches(monkeypatch):
    """In place of the kernels': one shape cannot be compiled, one fails while it is timed, one computes something else."""
    calls = {}

    def call(_case, inputs, shape):
        def run():
            calls[shape] = calls.get(shape, 0) + 1
            if shape == (8, 2):
                raise RuntimeError("")
            if shape == (16, 1) and calls[shape] > 1:
                raise RuntimeError("out of memory\nbeside the rest")
            return inputs.logits_TV.sum() + (1e6 if shape == (4, 4) else 0)

        return run

    monkeypatch.setattr(tune, "_call", call)
    monkeypatch.setattr(tune, "SECONDS", 0.05)
    monkeypatch.setattr(tune, "current", lambda: (8, 1))
    return calls


def test_a_sweep_gives_times_and_says_what_failed(launches):
    times, failed = tune._sweep(CASE, make_inputs(CASE, CPU))
    assert set(times) == {floor.COPY, *tune.CONFIGURATIONS} - {(8, 2), (16, 1), (4, 4)}
    assert [line.split(":")[0].strip() for line in failed] == ["4 warps, 4 vectors", "8 warps, 2 vectors", "16 warps, 1 vectors"]
    assert failed[1].endswith("RuntimeError: ")
    copy = times.pop(floor.COPY)
    rows = tune._rows(CASE, times, copy)
    assert [row[-1] for row in rows].count("in use") == 1
    assert report.table(tune.HEADERS, rows)


def test_what_was_measured_is_kept_when_it_is_cut_short(launches, tmp_path, monkeypatch):
    written = []
    plain = tune._sweep

    def sweep(case, inputs):
        if written:
            raise KeyboardInterrupt
        written.append(1)
        return plain(case, inputs)

    machine = report.machine(CPU)
    monkeypatch.setattr(tune, "_sweep", sweep)
    monkeypatch.setattr(tune, "make_inputs", lambda case, _: make_inputs(CASE, CPU))
    monkeypatch.setattr(report, "device_name", lambda _: "some GPU")
    monkeypatch.setattr(report, "machine", lambda _: machine)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(SimpleNamespace(type="cuda"), tmp_path)
    (file,) = tmp_path.iterdir()
    (record,) = json.loads(file.read_text())["sweeps"]
    assert len(record["milliseconds"]) == len(tune.CONFIGURATIONS) - 3
    assert len(record["failed"]) == 3


def test_a_cpu_is_refused(tmp_path):
    with pytest.raises(InputError, match="--tune: needs a CUDA device"):
        tune.tune(CPU, tmp_path)
