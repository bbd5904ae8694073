"""The suite on tiny cases: wrong contenders are not timed, failing ones are listed, and the truth is the truth."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.kernels.cases import BOTH, BOTH_INPLACE, FORWARD, OPERATIONS, Case
from benchmarks.kernels.contender import Contender, Gradient, Outputs
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.memory import Memory, measure_cpu, returned_bytes
from benchmarks.kernels.ours import Keju
from benchmarks.kernels.plain import Eager
from benchmarks.kernels.suite import Effort, Suite
from benchmarks.kernels.truth import Truth, wrong

CPU = torch.device("cpu")
SHAPES = {"linear": (16, 40), "clipped": (0, 0), "repetition": (0, 0)}


def case_of(operation: str, mode: str, dtype: str = "float32") -> Case:
    vocabulary, hidden = SHAPES.get(operation.partition("_")[0], (200, 0))
    return Case(operation, mode, 24 if operation != "repetition" else 512, vocabulary, hidden, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("operation", "mode"), [(name, mode) for name, modes in OPERATIONS.items() for mode in modes])
def test_our_kernels_and_plain_pytorch_are_right_in_every_mode(operation, mode, dtype):
    case = case_of(operation, mode, dtype)
    inputs = make_inputs(case, CPU)
    for contender in (one for one in (Keju(), Eager()) if one.offers(case)):
        prepared = contender.prepare(case, inputs)
        for _ in range(2):
            if prepared.before is not None:
                prepared.before()
            errors = Truth(inputs).errors(prepared.run(), contender.gradient(case) if case.with_gradient else Gradient.NONE)
            assert wrong(errors, dtype) is None, (contender.name, errors)
            assert errors or operation == "repetition"


class Broken(Contender):
    name = "peer A"
    operations = ("logprob_entropy",)

    def function(self, case, inputs):
        raise RuntimeError("no kernel image\nis available")


class Wrong(Eager):
    name = "peer B"

    def function(self, case, inputs):
        right = super().function(case, inputs)

        def off(*leaves):
            outputs = right(*leaves)
            return Outputs(outputs.logprob_T + 0.5, outputs.entropy_T)

        return off


class WrongGradient(Eager):
    name = "peer C"

    def gradient(self, case):
        return Gradient.LOGPROB if case.with_gradient else Gradient.NONE


class Huge(Eager):
    name = "peer D"

    def working_bytes(self, case):
        return 1 << 60


def measure(case: Case, *contenders: Contender, names: frozenset[str] = frozenset()):
    return Suite(CPU, contenders, Effort(seconds=0.05, memory=frozenset())).measure(case, names)


def test_who_fails_is_wrong_or_does_not_fit_is_listed_and_not_timed():
    result = measure(case_of("logprob_entropy", BOTH), Keju(), Broken(), Wrong(), Huge())
    assert result.of("keju").milliseconds.rounds >= 5
    assert result.of("peer A").reason == "fails: RuntimeError: no kernel image"
    assert result.of("peer B").reason.startswith("wrong: logprob is off by 0.5")
    assert result.of("peer D").reason.startswith("needs about 1073741824 GiB")
    assert all(result.of(f"peer {letter}").milliseconds is None for letter in "ABD")
    assert result.floor_ms > 0


def test_a_gradient_of_something_else_is_compared_with_that_and_not_with_ours():
    case = case_of("logprob_entropy", BOTH)
    inputs = make_inputs(case, CPU)
    outputs = WrongGradient().prepare(case, inputs).run()
    truth = Truth(inputs)
    assert wrong(truth.errors(outputs, Gradient.LOGPROB), "float32") is None
    assert "d_logits" in wrong(truth.errors(outputs, Gradient.PAIR), "float32")


def test_nan_is_wrong():
    assert wrong({"logprob": float("nan")}, "bfloat16") == "wrong: logprob is off by nan"


def test_only_the_named_contenders_run():
    assert [
        one.contender
        for one in measure(case_of("logprob_entropy", FORWARD), Keju(), Eager(), names=frozenset({"keju"})).measurements
    ] == ["keju"]


def test_cases_after_the_deadline_are_listed_as_not_reached():
    cases = {case_of("logprob_entropy", FORWARD): frozenset({"keju"}), case_of("repetition", FORWARD): frozenset({"keju"})}
    seen = []
    suite = Suite(CPU, [Keju()], Effort(seconds=0.05, memory=frozenset()))
    results = suite.run(cases, time.monotonic() - 1, lambda results: seen.append(len(results)))
    assert [result.skipped for result in results] == ["not reached: the time was up"] * 2
    assert seen == [1, 2]


def test_inputs_that_do_not_fit_skip_the_case():
    result = measure(Case("logprob_entropy", FORWARD, 1 << 22, 1 << 20), Keju())
    assert "for its inputs" in result.skipped


def test_memory_on_a_cpu_counts_what_a_call_takes_and_what_it_gives_back():
    """64 MB of logits in fp32: the gradient is 64 MB, in place nothing; eager needs several tables more."""
    case = Case("logprob_entropy", BOTH, 256, 65_536, dtype="float32")
    inplace = Case("logprob_entropy", BOTH_INPLACE, 256, 65_536, dtype="float32")
    ours, over, eager, nobody = measure_cpu([(case, "keju"), (inplace, "keju"), (case, "torch eager"), (case, "nobody")])
    size = 256 * 65_536 * 4
    assert isinstance(ours, Memory), ours
    assert 0.98 * size <= ours.extra <= 1.05 * size
    assert ours.returned == pytest.approx(size, rel=1e-3)
    assert isinstance(over, Memory), over
    assert over.extra <= 0.02 * size
    assert isinstance(eager, Memory), eager
    assert eager.extra >= 2.9 * size
    assert nobody == "KeyError: 'nobody'"


def test_returned_bytes_count_a_storage_once_and_known_ones_never():
    tensor = torch.zeros(10)
    outputs = Outputs(logprob_T=tensor[:5], entropy_T=tensor[5:], loss=torch.zeros(()))
    assert returned_bytes(outputs, set()) == 44
    assert returned_bytes(outputs, {tensor.untyped_storage().data_ptr()}) == 4
