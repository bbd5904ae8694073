"""Correctness by rule: verdicts on real cases, and the hard time limit: hanging answers end on time and leave no process behind.

What counts as the same answer is in test_rule_answers.py; here only that no case is lost that the library itself gets right.
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
from rollout.reward import confine, rule_worker, rules
from rollout.reward.checker import Checker
from rollout.reward.rule import RuleVerifier, _key, check_prompt
from rollout.reward.rules import RULES, Rule
from rollout.types import Prompt

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / os.environ.get("KEJU_TEST_DATA", "../shared/data")
HANGS = [rf"$9^{{9^{{9^{{{top}}}}}}}$" for top in range(9, 40)]


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


EXCEPTIONS = {(r"$1 - \frac{1}{\mathrm{e}}$", r"$1 + \frac{1}{\mathrm{e}}$")}
"""The one of the library's own cases in which it is not followed: it takes the two for equal, and its test says so."""


def library_cases() -> list[tuple[str, str, bool]]:
    """(gold, pred, expected) of the library's own tests of verdicts."""
    path = DATA / "verifier_tests" / "math_verify_parametrized.jsonl"
    if not path.exists():
        pytest.skip(f"no test data at {path} (set KEJU_TEST_DATA)")
    cases = [json.loads(line)["args"] for line in path.read_text().splitlines()]
    return [(case["gold"], case["pred"], bool(case.get("expected", case.get("result")))) for case in cases if "gold" in case]


def test_what_the_library_gets_right_we_get_right(verifier):
    from math_verify import parse, verify

    cases = library_cases()
    assert len(cases) == 269
    library = [verify(parse(gold), parse(pred)) for gold, pred, _ in cases]
    ours = verifier.verify([(prompt(gold), pred) for gold, pred, _ in cases])
    known = [case[2] == bool(theirs) for case, theirs in zip(cases, library, strict=True)]
    assert sum(known) > 0.95 * len(cases)
    lost = {case[:2] for case, mine, good in zip(cases, ours, known, strict=True) if good and mine.right != case[2]}
    assert lost == EXCEPTIONS


def test_hand_labelled_pairs(verifier):
    """Every one that its reader did not call ambiguous."""
    path = DATA / "verifier_pairs" / "hard_disagreements_handlabelled.jsonl"
    if not path.exists():
        pytest.skip(f"no test data at {path} (set KEJU_TEST_DATA)")
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["label"] != "ambiguous"]
    verdicts = verifier.verify([(prompt(row["gold"]), row["pred"]) for row in rows])
    assert len(rows) == 60
    assert not [(row["gold"], row["pred"]) for row, verdict in zip(rows, verdicts, strict=True) if verdict.right != row["label"]]


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
        assert len(workers() - before) <= 4, "killed processes are replaced, not added to: two workers, each with one"
    assert workers() == before


def test_answers_that_nobody_waits_behind_get_the_whole_of_their_time():
    """As many as there are workers: nothing is held back for others."""
    with RuleVerifier("math-verify", workers=2, timeout_seconds=1.0) as verifier:
        verdicts = verifier.verify([(prompt("5"), HANGS[0]), (prompt("5"), HANGS[1])])
    assert [verdict.detail for verdict in verdicts] == ["no verdict within 1 s"] * 2


def test_more_hangs_than_workers_take_turns():
    """The deadline counts from the start in a worker: the third's does not pass while it waits."""
    with RuleVerifier("math-verify", workers=1, timeout_seconds=1.0) as verifier:
        assert reasons(verifier, ("5", HANGS[2]), ("5", HANGS[3]), ("5", "5.0")) == ["timeout", "timeout", "right"]


def test_a_batch_in_which_a_tenth_hangs_ends_in_time_and_judges_the_rest():
    """256 answers on two workers: one by one the 26 that hang would take 2 minutes. Answers put behind them are judged too."""
    before = workers()
    seconds = 20.0
    with RuleVerifier("math-verify", workers=2, timeout_seconds=10.0, batch_seconds=seconds) as verifier:
        assert reasons(verifier, ("1", "1.0")) == ["right"]
        hangs = [("5", hang) for hang in HANGS[:26]]
        others = [(str(place), f"{place + place % 2}.0") for place in range(230)]
        start = time.monotonic()
        given = reasons(verifier, *hangs, *others)
        elapsed = time.monotonic() - start
    assert elapsed < seconds + 1.0, f"a deadline of {seconds:g} s took {elapsed:.1f} s"
    assert given[:26] == ["timeout"] * 26
    assert given[26:] == ["wrong" if place % 2 else "right" for place in range(230)]
    assert workers() == before


def test_without_time_for_a_first_turn_there_is_no_verdict():
    """Answers that nobody looked at are not called wrong."""
    with RuleVerifier("math-verify", workers=1, timeout_seconds=10.0, batch_seconds=0.4) as verifier:
        given = reasons(verifier, *[("5", hang) for hang in HANGS[:12]], ("5", "5.0"))
    assert set(given[:-1]) == {"timeout", "unjudged"}
    assert given[-1] == "right", "what looks quick comes first"


def test_answers_that_were_late_get_longer_turns():
    """Where few hang, each gets the whole deadline, after all others have had their turn."""
    with RuleVerifier("math-verify", workers=1, timeout_seconds=1.0, batch_seconds=8.0) as verifier:
        assert reasons(verifier, ("1", "1.0")) == ["right"]
        answers = [("5", HANGS[0]), *[(str(place), "7.0") for place in range(30)]]
        verdicts = verifier.verify([(prompt(gold), answer) for gold, answer in answers])
    assert verdicts[0].detail == "no verdict within 1 s"
    assert [verdict.right for verdict in verdicts[1:]] == [place == 7 for place in range(30)]


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


def test_a_puzzle_without_an_answer_is_refused_and_earns_nothing():
    """propositional_logic has no ground truth, and its scorer takes the premises given back for a conclusion."""
    premise = "(P ∧ (Q → R))"
    metadata = {"source_dataset": "propositional_logic", "premises": [premise], "variables": ["P", "Q", "R"]}
    for shape in (metadata, {"question": "?", "answer": None, "metadata": metadata}):
        prompt = Prompt("p", "q", "?", metadata=shape)
        with pytest.raises(InputError, match=r"^place: .*source_dataset: 'propositional_logic' .*; leave such prompts out$"):
            check_prompt("reasoning-gym", "place", prompt)
        check_prompt("math-verify", "place", prompt)
    check_prompt("reasoning-gym", "place", Prompt("p", "q", "1", metadata={"source_dataset": "chain_sum"}))
    check_prompt("reasoning-gym", "place", Prompt("p", "q", "1"))
    right, reason, detail = RULES["reasoning-gym"].score("?", premise, {"question": "?", "answer": None, "metadata": metadata})
    assert (right, reason) == (False, "error")
    assert "cannot be scored" in detail


def test_countdown_and_puzzle24_are_held_to_their_numbers():
    """reasoning-gym takes each of these for right."""
    make_24 = {"source_dataset": "puzzle24", "numbers": [9, 9, 2, 6]}
    count = {"source_dataset": "countdown", "numbers": [9, 9, 2, 6], "target": 108}
    cases = [
        (make_24, "2*((9 + 9) - 6)", True),
        (make_24, "8*3*1*1", False),
        (count, "9*(9 + 6/2)", True),
        (count, "108e0+0e0*(9+9+2+6)", False),
        (count, "108e0*E/E+0e0*(9+9+2+6)", False),
    ]
    with RuleVerifier("reasoning-gym", workers=1, timeout_seconds=30.0) as verifier:
        verdicts = verifier.verify([(Prompt("p", "q", "gold", metadata=entry), answer) for entry, answer, _ in cases])
    assert [verdict.right for verdict in verdicts] == [right for *_, right in cases]


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
    from rollout.reward.rule import RuleVerifier, check_prompt
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

    monkeypatch.setitem(RULES, "math-verify", Rule(leave))
    assert rule_worker.score("math-verify", "1", "2", {})[:2] == (False, "error")


def puzzle(name: str, seed: int = 1) -> dict:
    import reasoning_gym

    (item,) = reasoning_gym.create_dataset(name, size=1, seed=seed)
    return item


def judged(verifier: RuleVerifier, item: dict, answer: str):
    (verdict,) = verifier.verify([(Prompt("p", item["question"], item["answer"], metadata=item["metadata"]), answer)])
    return verdict


def test_a_puzzle_given_back_as_a_call_is_wrong_and_says_why():
    """reasoning-gym executes such an answer, and finds it right."""
    integral, product = puzzle("simple_integration"), puzzle("polynomial_multiplication")
    metadata = integral["metadata"]
    given_back = {
        f"integrate({metadata['integrand']}, {metadata['variable']})": integral,
        f"expand({product['metadata']['polynomial_expr']})": product,
    }
    from reasoning_gym import get_score_answer_fn

    with RuleVerifier("reasoning-gym", workers=1, timeout_seconds=30.0) as verifier:
        for answer, item in given_back.items():
            assert get_score_answer_fn(item["metadata"]["source_dataset"])(answer=answer, entry=item) == 1.0
            verdict = judged(verifier, item, answer)
            assert verdict.reason == "wrong"
            assert verdict.detail.startswith("not scored: it calls")
            assert judged(verifier, item, item["answer"]).right


def test_an_answer_that_changes_the_scorer_changes_no_other_verdict(monkeypatch):
    """Even where the text is let through: each answer with more than numbers in it has a process of its own."""
    item = puzzle("spiral_matrix")
    poison = (
        '[setattr(__import__("reasoning_gym.algorithmic.spiral_matrix",fromlist=["a"]).SpiralMatrixDataset,'
        '"score_answer",lambda self,answer,entry:1.0)]'
    )
    monkeypatch.setattr(rules, "refusal", lambda *_: None)
    checker = Checker(rule_worker.score)
    monkeypatch.setattr(rule_worker, "_checker", checker, raising=False)
    jobs = [(item["answer"], answer, item) for answer in ("8", poison, "8", "[8]", "[garbage]")]
    try:
        scores = rule_worker.check("reasoning-gym", jobs, 20.0, 20.0, time.monotonic() + 100)
        assert [score[1] for score in scores] == ["wrong"] * 5
        # In one process it would do what it says.
        shared = [checker.call(20.0, 20.0, "reasoning-gym", *job) for job in jobs[1:3]]
        assert [score[1] for score in shared] == ["wrong", "right"]
    finally:
        checker.close()


SLEEP = ["sleep", "60.0625"]
"""No other test's."""


def leave_a_process(how: str) -> str:
    try:
        if how == "fork":
            pid = os.fork()
            if not pid:
                os.setsid()
                os.execv("/bin/sleep", SLEEP)
        elif how == "spawn":
            pid = os.posix_spawn("/bin/sleep", SLEEP, {})
        else:
            pid = os.system(" ".join([*SLEEP, "&"]))
    except OSError as error:
        return error.strerror
    return str(pid)


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"), reason="there is no seccomp here")
@pytest.mark.parametrize("how", ["fork", "spawn", "system"])
def test_a_scorer_leaves_no_process_behind(how):
    """Its own session saves no grandchild from being killed if there can be none."""
    checker = Checker(leave_a_process)
    said = checker.call(5.0, 10.0, how, alone=True)
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == SLEEP]
    assert not left, left
    assert said in ("Operation not permitted", "-1", str(127 << 8)), said  # of `system`: no shell, as not found


def leave_a_process_in_the_group() -> int:
    pid = os.fork()
    if not pid:
        time.sleep(60)
    return pid


@pytest.mark.skipif(os.geteuid() != 0, reason="the limit on processes, from which root is exempt, leaves nothing to kill")
def test_without_seccomp_the_group_is_killed(monkeypatch):
    monkeypatch.setattr(confine, "_refuse_processes", lambda: None)
    pid = Checker(leave_a_process_in_the_group).call(5.0, 10.0, alone=True)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def what_is_open_and_writable(folder: str) -> tuple[int, list[int], str]:
    try:
        Path(folder, "written").write_text("x")
    except OSError as error:
        written = error.strerror
    else:
        written = "written"
    return os.getpgid(0) - os.getpid(), [number for number in range(3, 64) if is_open(number)], written


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_a_scorer_has_one_pipe_writes_no_file_and_leads_its_group(tmp_path):
    """The worker's own pipes, through which it could forge verdicts of others, are closed in it."""
    reading, writing = os.pipe()
    os.dup2(reading, 60)  # one of them behind the pipe
    checker = Checker(what_is_open_and_writable)
    group, open_files, written = checker.call(5.0, 10.0, str(tmp_path), alone=True)
    for number in (reading, writing, 60):
        os.close(number)
    assert group == 0
    assert len(open_files) == 1
    assert written == "File too large"
    assert not checker._pid, "the process was kept"


@pytest.mark.parametrize("error", [MemoryError("much"), RecursionError("deep")])
def test_what_ran_out_of_memory_is_an_error_and_not_wrong(monkeypatch, error):
    def run_out(*_: object) -> None:
        raise error

    for kind in RULES:
        monkeypatch.setitem(RULES, kind, Rule(run_out))
        right, reason, detail = rule_worker.score(kind, "1", "2", {})
        assert (right, reason, detail) == (False, "error", f"{type(error).__name__}: {error}")


def test_metadata_that_is_no_json_has_a_key():
    made = [
        _key("reasoning-gym", Prompt("p", "q", "1", metadata={(1, 2): value, 3: {"a": 1}, "b": 0}), "1") for value in (5, 5, 6)
    ]
    assert made[0] == made[1] != made[2]
