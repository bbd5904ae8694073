"""The gates fail where they must, say by how much, and forgive a disturbed measurement only when a new one holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import CASE, NAMES, gate, measured, result

from benchmarks.kernels.gates import TORCH_FP32, judge, judge_all, read
from benchmarks.kernels.registry import contenders
from rollout.errors import InputError

GOOD = """
[[gate]]
name = "forward"
device = "cpu"
operation = "logprob_entropy"
mode = "forward"
tokens = [512, 1024]
vocabulary = 1024
metric = "speedup"
baseline = "torch eager"
at_least = 2
generous = 1.5
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gates.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_each_metric_holds_and_breaks_at_its_limit():
    keju = measured(
        "keju", 10.0, extra_bytes=2_500_000_000, returned_bytes=500_000_000, errors={"logprob": 3e-6, "d_logits": 0.2}
    )
    eager = measured("torch eager", 45.0, errors={"d_logits": 0.1})
    everything = result(
        keju, eager, measured("peer A", 12.0, kind="peer"), floor_ms=9.0, fp32_errors={"logprob": 1e-6, "entropy": 1e-6}
    )
    gradient = 512 * 1024 * 2
    for metric, value, more in (
        ("speedup", 4.5, {}),
        ("speedup_over_fastest_peer", 1.2, {}),
        ("share_of_floor", 0.9, {}),
        ("times_floor", 10 / 9, {}),
        ("milliseconds", 10.0, {}),
        ("memory_over_gradient", 2_500_000_000 / gradient, {}),
        ("memory_beyond_gb", 2.0, {}),
    ):
        assert judge(gate(metric, at_least=value * 0.999, **more), everything).state == "held", metric
        assert judge(gate(metric, at_least=value * 1.001, **more), everything).state == "broken", metric
        assert judge(gate(metric, at_most=value * 1.001, **more), everything).state == "held", metric
        assert judge(gate(metric, at_most=value * 0.999, **more), everything).state == "broken", metric
    error = {"metric": "error", "output": "logprob", "baseline": TORCH_FP32}
    assert judge(gate(**error, at_most=2.0, plus=1.1e-6), everything).state == "held"
    assert judge(gate(**error, at_most=2.0, plus=0.9e-6), everything).state == "broken"
    against_eager = {"metric": "error", "output": "d_logits", "baseline": "torch eager"}
    assert judge(gate(**against_eager, at_most=2.1), everything).state == "held"
    assert judge(gate(**against_eager, at_most=1.9), everything).state == "broken"


def test_a_broken_line_says_what_it_measured_and_by_how_much_it_is_off():
    verdict = judge(gate(at_least=4.0), result(measured("keju", 10.0), measured("torch eager", 30.0)))
    assert verdict.state == "broken"
    assert verdict.text == "speedup 3, must be ≥ 4: off by 25.0%"


def test_nan_holds_no_limit():
    nan = result(measured("keju", 1.0, errors={"logprob": float("nan")}), fp32_errors={"logprob": 1.0})
    assert judge(gate("error", output="logprob", baseline=TORCH_FP32, at_most=5.0), nan).state == "broken"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "was not measured"),
        (result(skipped="not reached: the time was up"), "not reached"),
        (result(measured("torch eager", 30.0)), "keju was not measured"),
        (result(measured("keju", None, reason="fails: RuntimeError"), measured("torch eager", 1.0)), "fails: RuntimeError"),
        (result(measured("keju", 1.0), measured("torch eager", None, reason="needs 9 GiB")), "needs 9 GiB"),
    ],
)
def test_what_cannot_be_judged_is_broken(found, said):
    verdict = judge(gate(), found)
    assert verdict.state == "broken"
    assert said in verdict.text


def test_no_memory_figure_is_broken_and_names_its_reason():
    verdict = judge(gate("memory_over_gradient", at_most=1.1), result(measured("keju", 1.0, memory_note="killed")))
    assert (verdict.state, verdict.text) == ("broken", "cannot be judged: killed")


def test_fastest_peer_counts_and_no_peer_is_not_judged():
    line = gate("speedup_over_fastest_peer", at_least=1.0)
    both = (measured("peer A", 20.0, kind="peer"), measured("peer B", 9.0, kind="peer"))
    assert judge(line, result(measured("keju", 10.0), *both)).state == "broken"
    assert judge(line, result(measured("keju", 10.0), both[0])).state == "held"
    missing = measured("peer A", None, kind="peer", reason="not installed")
    assert judge(line, result(measured("keju", 10.0), missing)).state == "not judged"


def test_a_retry_that_holds_passes_and_two_that_do_not_fail():
    bad = result(measured("keju", 10.0), measured("torch eager", 30.0))
    good = result(measured("keju", 10.0), measured("torch eager", 50.0))
    again = [bad, good]
    (verdict,) = judge_all([gate()], {CASE: bad}, lambda _: again.pop(0))
    assert (verdict.state, verdict.attempts) == ("held", 3)
    asked = []
    (verdict,) = judge_all([gate()], {CASE: bad}, lambda line: asked.append(line) or bad)
    assert (verdict.state, verdict.attempts, len(asked)) == ("broken", 3, 2)
    (verdict,) = judge_all([gate()], {CASE: bad}, lambda _: good, may_retry=lambda: False)
    assert (verdict.state, verdict.attempts) == ("broken", 1)
    (verdict,) = judge_all([gate()], {CASE: good}, lambda _: pytest.fail("measured again without need"))
    assert (verdict.state, verdict.attempts) == ("held", 1)


def test_generous_limits_replace_claimed_ones_where_there_are_some():
    assert gate(at_least=4.0, generous=1.5).lenient().at_least == 1.5
    assert gate("milliseconds", at_most=2.0, generous=8.0).lenient().at_most == 8.0
    assert gate(at_least=4.0).lenient().at_least == 4.0


def test_a_list_of_tokens_becomes_a_line_each(tmp_path):
    first, second = read(write(tmp_path, GOOD), NAMES)
    assert (first.case.tokens, second.case.tokens) == (512, 1024)
    assert first.at_least == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("at_least", "at_leest"), "unknown key 'at_leest'"),
        (('device = "cpu"', 'device = "toaster"'), "device: 'toaster'"),
        (('metric = "speedup"', 'metric = "speed"'), "metric: 'speed'"),
        (('mode = "forward"', 'mode = "sideways"'), "no such case: mode"),
        (('"logprob_entropy"', '"logprob"'), "no such case: operation: 'logprob'"),
        (("vocabulary = 1024\n", ""), "no such case: vocabulary"),
        (("vocabulary = 1024", 'vocabulary = "many"'), "vocabulary: 'many' is of the wrong type"),
        (("tokens = [512, 1024]", 'tokens = ["many"]'), "tokens: ['many'] is of the wrong type"),
        (("tokens = [512, 1024]\n", ""), "tokens is missing"),
        (("at_least = 2\n", ""), "at_least, at_most"),
        (("at_least = 2", "at_least = 2\nat_most = 3"), "at_least, at_most"),
        (('baseline = "torch eager"\n', ""), "baseline: speedup needs one"),
        (("torch eager", "torch eagle"), "no contender 'torch eagle'"),
        (("at_least = 2", "at_least = true"), "at_least: True is of the wrong type"),
        (("tokens = [512, 1024]", "tokens = [512, 512]"), "stands twice"),
        (("[[gate]]", "[[gait]]"), "expected [[gate]] tables"),
        (("at_least = 2", "at_least ="), "is no TOML"),
    ],
)
def test_a_line_that_means_nothing_is_refused_in_one_line(tmp_path, change, said):
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(InputError) as refused:
        read(path, NAMES)
    text = str(refused.value)
    assert said in text
    assert text.startswith(str(path))
    assert "\n" not in text


def test_the_projects_own_gates_can_be_read():
    import torch

    path = Path(__file__).resolve().parents[2] / "benchmarks" / "gates.toml"
    lines = read(path, [one.name for one in contenders(torch.device("cpu"))])
    assert {line.device for line in lines} == {"cpu", "hopper"}
