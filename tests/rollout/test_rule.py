"""Correctness by rule: verdicts on real cases, and the hard time limit: hanging answers end on time and leave no process behind.

What it does not show: that math-verify is right. Its verdicts are compared with its own test cases, and where we give it other
text than was written (`math_forms`), with cases written here.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from rollout.errors import InputError
from rollout.reward import rule_worker
from rollout.reward.rule import RuleVerifier
from rollout.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / os.environ.get("KEJU_TEST_DATA", "../shared/data")
HANGS = ["$9^{9^{9^{9}}}$", "$(10^9)!$", "$10^{10^{10}}$", "$2^{2^{2^{2^{2^{2}}}}}$"]


def prompt(gold: str) -> Prompt:
    return Prompt("p", "q", gold)


def reasons(verifier: RuleVerifier, *pairs: tuple[str, str]) -> list[str]:
    return [verdict.reason for verdict in verifier.verify([(prompt(gold), answer) for gold, answer in pairs])]


def workers() -> set[int]:
    """This process' children, without multiprocessing's resource tracker, which stays until the program's end."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if child.is_running() and "resource_tracker" not in " ".join(child.cmdline())}


@pytest.fixture(scope="module")
def verifier():
    with RuleVerifier("math-verify", workers=2, timeout_seconds=60.0) as shared:
        yield shared


MEANT = [
    ("72", "72.0", True),
    ("1,000", "1000", True),
    ("1000", "$1{,}000$", True),
    ("$18", "18", True),
    (r"\$18", "$18$", True),
    ("72", "The answer is 72 dollars.", True),
    ("12", "5 cm", False),
    ("5", "5 cm", True),
    ("12", "12岁", True),
    (r"\frac{3}{7}", "3/7", True),
    (r"\frac{3}{7}", "7", False),
    (r"2\sqrt{3}", "2", False),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("x+1", "1", False),
    ("x+1", "$1+x$", True),
    (r"(2,\infty)", r"$(2,\infty)$", True),
    (r"(2,\infty)", r"[2,\infty)", False),
    ("1,2,3", "$3,2,1$", True),
    ("1,22", "1.22", True),
    ("3e6", r"3 \times 10^{6}", True),
    ("3e6", "3", False),
    ("Sunday", "sunday", True),
    ("Sunday", "Monday", False),
    (r"\text{even}", "even", True),
    ("abc", "$abc$", True),
    ("12:00", "11:00", False),
    (r"10\,080", "0", False),
    ("三角形", "三角形", True),
]


def test_bare_text_is_read_as_meant(verifier):
    """One job for each: the library alone takes 2\\sqrt{3} for 2, and finds nothing in x+1."""
    verdicts = verifier.verify([(prompt(gold), answer) for gold, answer, _ in MEANT])
    wrong = [(case, verdict) for case, verdict in zip(MEANT, verdicts, strict=True) if verdict.right != case[2]]
    assert not wrong
    assert {verdict.reason for verdict in verdicts} == {"right", "wrong"}


def library_cases() -> list[tuple[str, str, bool]]:
    """(gold, pred, expected) of every second of the library's own tests that needs no special configuration."""
    path = DATA / "verifier_tests" / "math_verify_parametrized.jsonl"
    if not path.exists():
        pytest.skip(f"no test data at {path} (set KEJU_TEST_DATA)")
    cases = [json.loads(line)["args"] for line in path.read_text().splitlines()]
    plain = [case for case in cases if set(case) in ({"gold", "pred", "expected"}, {"gold", "pred", "result"})]
    return [(case["gold"], case["pred"], bool(case.get("expected", case.get("result")))) for case in plain[::2]]


def test_what_the_library_gets_right_we_get_right(verifier):
    from math_verify import parse, verify

    cases = library_cases()
    assert len(cases) > 100
    library = [verify(parse(gold), parse(pred)) for gold, pred, _ in cases]
    ours = verifier.verify([(prompt(gold), pred) for gold, pred, _ in cases])
    known = [case[2] == bool(theirs) for case, theirs in zip(cases, library, strict=True)]
    assert sum(known) > 0.95 * len(cases)
    lost = [(case, mine) for case, mine, good in zip(cases, ours, known, strict=True) if good and mine.right != case[2]]
    assert not lost


def test_gold_without_content_is_an_error_not_a_wrong_answer(verifier):
    (verdict,) = verifier.verify([(prompt("$$"), "5")])
    assert (verdict.right, verdict.reason) == (False, "error")
    assert "ground truth" in verdict.detail


def test_hanging_answers_end_on_time_and_leave_no_process():
    before = workers()
    with RuleVerifier("math-verify", workers=2, timeout_seconds=1.0) as verifier:
        assert reasons(verifier, ("1", "1.0")) == ["right"]
        start = time.monotonic()
        # Two different hanging answers for two workers: the deadline once.
        assert reasons(verifier, ("5", HANGS[0]), ("5", HANGS[1]), ("5", HANGS[0])) == ["timeout"] * 3
        elapsed = time.monotonic() - start
        assert 1.0 <= elapsed < 1.0 + 1.5, f"a deadline of 1 s took {elapsed:.1f} s"
        answers = [("5", HANGS[0]), ("5", "5.0"), ("5", HANGS[1]), ("5", "6")]
        assert reasons(verifier, *answers) == ["timeout", "right", "timeout", "wrong"], "order kept, each judged"
        assert len(workers() - before) <= 2, "killed workers are replaced, not added to"
    assert workers() == before


def test_more_hangs_than_workers_take_turns():
    """The deadline counts from the start in a worker: the third's does not pass while it waits."""
    with RuleVerifier("math-verify", workers=1, timeout_seconds=1.0) as verifier:
        assert reasons(verifier, ("5", HANGS[2]), ("5", HANGS[3]), ("5", "5.0")) == ["timeout", "timeout", "right"]


def test_cache_returns_without_workers_and_forgets_the_oldest(verifier):
    with RuleVerifier("math-verify", workers=1, timeout_seconds=30.0, cache_size=2) as small:
        assert reasons(small, ("1", "2"), ("1", "3"), ("1", "4")) == ["wrong"] * 3
        small.close()
        before = workers()
        assert reasons(small, ("1", "4"), ("1", "3")) == ["wrong"] * 2
        assert workers() == before, "a cached verdict needed a worker"
        assert reasons(small, ("1", "2")) == ["wrong"]
        assert workers() != before, "the oldest verdict was not forgotten"


def test_reasoning_gym_scores_by_the_puzzle():
    """Two puzzles with equal gold texts are two cache entries; metadata may be the entry or the entry's metadata."""
    import reasoning_gym

    (item,) = reasoning_gym.create_dataset("countdown", size=1, seed=4)
    metadata = json.loads(json.dumps(item["metadata"]))
    other = {**metadata, "target": metadata["target"] + 1}
    solution = metadata["expression"]
    entries = [metadata, {"metadata": metadata}, other, {"source_dataset": "no_such_set"}]
    with RuleVerifier("reasoning-gym", workers=1, timeout_seconds=30.0) as verifier:
        verdicts = verifier.verify([(Prompt("p", item["question"], "gold", metadata=entry), solution) for entry in entries])
    assert [verdict.reason for verdict in verdicts] == ["right", "right", "wrong", "error"]
    assert "no_such_set" in verdicts[3].detail


def test_workers_are_light_and_deaf_to_ctrl_c(verifier):
    assert reasons(verifier, ("1", "1.00")) == ["right"]
    # eval is a builtin: a function of this file would make the worker import this file, and pytest with it.
    modules = verifier._pool.submit(eval, 10.0, "sorted(__import__('sys').modules)").result()
    assert "math_verify" in modules
    assert not {"torch", "transformers", "numpy", "pytest"} & set(modules)
    ids = workers()
    for pid in ids:
        os.kill(pid, signal.SIGINT)
    assert reasons(verifier, ("1", "1.000"), ("1", "1.0000")) == ["right", "right"]
    assert workers() == ids


def test_a_killed_worker_costs_its_job_only_and_an_idle_one_nothing(verifier):
    assert reasons(verifier, ("2", "2.0")) == ["right"]
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert reasons(verifier, ("2", "2.00"), ("2", "3.00")) == ["right", "wrong"]


def test_started_in_a_short_thread_the_workers_live_on():
    """The kernel's death signal follows the thread that started the worker."""
    made: list[RuleVerifier] = []

    def make_and_use() -> None:
        made.append(RuleVerifier("math-verify", workers=1, timeout_seconds=30.0))
        reasons(made[0], ("3", "3.0"))

    thread = threading.Thread(target=make_and_use)
    thread.start()
    thread.join()
    with made[0] as verifier:
        started = verifier._pool
        time.sleep(0.5)
        assert reasons(verifier, ("3", "3.00")) == ["right"]
        assert verifier._pool is started, "the pool broke and was replaced"


PARENT = """
    import sys, time
    sys.path.insert(0, sys.argv[1])
    import threading
    import psutil
    from rollout.reward.rule import RuleVerifier
    from rollout.types import Prompt

    # No main guard on purpose: workers must not run this file again.
    verifier = RuleVerifier("math-verify", 2, 60.0)
    verifier.verify([(Prompt("p", "q", "1"), "1.0"), (Prompt("p", "q", "1"), "2.0")])
    hang = [(Prompt("p", "q", "5"), r"$9^{9^{9^{9}}}$")]
    threading.Thread(target=verifier.verify, args=(hang,), daemon=True).start()
    time.sleep(1.0)
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
"""


@pytest.mark.parametrize("end", ["wait", "exit"])
def test_workers_die_with_their_parent(tmp_path, end):
    """Killed outright ("wait"), or at its end without close ("exit"), with one worker idle and one hanging in C."""
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen([sys.executable, script, str(ROOT), end], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) >= 2, "the parent has no workers"
    if end == "wait":
        parent.kill()
    parent.wait(timeout=20)
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """A zombie counts as dead: an orphan waits for whoever reaps it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("math_verify", 1, 1.0), "'math-verify'"),
        (("math-verify", 0, 1.0), "workers: 0"),
        (("math-verify", 1, 0.0), "timeout_seconds: 0.0"),
    ],
)
def test_wrong_settings_are_one_line(arguments, named):
    with pytest.raises(InputError) as caught:
        RuleVerifier(*arguments)
    assert named in str(caught.value)


def test_no_exception_of_a_scorer_travels(monkeypatch):
    def leave(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(rule_worker, "_math_verify", leave)
    assert rule_worker.score("math-verify", "1", "2", {})[:2] == (False, "error")
