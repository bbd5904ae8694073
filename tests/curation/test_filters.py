"""Decontamination, missing ground truth, question types, answers that no rule can verify."""

import sys
import time
from pathlib import Path

import pytest

from curation import verify_worker
from curation.options import Options, Source
from curation.steps.decontaminate import decontaminate, index, read_benchmarks
from curation.steps.ground_truth import remove_without_truth
from curation.steps.question_type import remove_types
from curation.steps.verifiable import is_text, remove_unverifiable, verify
from tests.curation.conftest import gone

TEST = (
    "Every morning Aya goes for a 9-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a constant "
    "speed of s kilometers per hour, the walk takes her 4 hours, including t minutes spent in the coffee shop."
)
CHINESE = "幾個小朋友分蘋果，每人分五個還剩下三個，每人分六個就少兩個，那麼一共有多少個蘋果呢？"


def check(table, *tests: str, **options: object):
    found = Options(threads=1, **options)
    return decontaminate(table, index([f"bench-{number}" for number in range(len(tests))], list(tests), found.ngram), found)


def test_a_test_question_is_found_in_any_typing(rows) -> None:
    table = rows(
        TEST.upper(),
        "几个小朋友分苹果,每人分五个还剩下三个,每人分六个就少两个,那么一共有多少个苹果呢?",
        "Find $\\left( 3,\\ x \\right)$ if ２x＝6",
        "Find (3,x) if 2x=7",
        "Something else entirely, with no number in it at all",
    )
    outcome = check(table, TEST, CHINESE, r"Find \left(3, x\right) if $2x = 6$")
    assert gone(outcome) == {0: "exact", 1: "exact", 2: "exact"}
    assert outcome.removed.partners.tolist() == ["bench-0", "bench-1", "bench-2"]


def test_overlap(rows) -> None:
    words = TEST.split()
    table = rows(
        "A story before it. " + TEST + " And a question after it?",
        TEST.replace("Every morning Aya", "Each evening Ben"),
        " ".join(words[:25]),
        " ".join(words[:12])
        + " and then something else happens that has nothing to do with it, and so on for many more words than before it",
        CHINESE[:24] + "請問他們要多少個才夠分",
    )
    outcome = check(table, TEST, CHINESE)
    assert gone(outcome) == {0: "overlap", 1: "overlap", 2: "overlap"}
    assert outcome.removed.scores[0] == 1.0
    assert outcome.removed.scores[2] == 1.0  # an excerpt: all of its own n-grams
    assert set(gone(check(table, TEST, CHINESE, overlap=0.3))) >= {0, 1, 2, 4}


def test_boilerplate_counts_nothing(rows) -> None:
    form = (
        "Enter your answer in the form Ax + By + Cz + D = 0 where A, B, C, D are integers such that A is positive and they "
        "are coprime."
    )
    tests = [f"Find the plane through point number {number} that is told in figure {number}. {form}" for number in range(8)]
    assert (
        gone(
            check(rows(f"A plane is parallel to another one and passes through the origin of space. {form}"), *tests, overlap=0.4)
        )
        == {}
    )


def test_a_short_test_question_is_found_exactly_only(rows) -> None:
    assert gone(check(rows("What is 2+3?", "What is 2+3? Say it."), "what is 2 + 3")) == {0: "exact"}
    assert gone(check(rows(r"Find $\sqrt{2}x$", r"Find $\sqrt{2 x}$"), r"Find $\sqrt{2x}$")) == {1: "exact"}


def test_no_benchmarks(rows) -> None:
    assert gone(check(rows("a", "b"))) == {}


def test_benchmarks_are_read_with_and_without_options(tmp_path, rows) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text(
        '{"question": "Which of these is a prime number?", "options": ["(A)4", "(B)7"], "label": "B", "answer": null}\nbroken\n'
    )
    found = read_benchmarks([Source(path)], Options())
    assert found.ids == ["agieval-000001"] * 2
    table = rows("Which of these is a prime number", "Which of these is a prime number?\n(A)4\n(B)7")
    assert gone(decontaminate(table, found, Options(threads=1))) == {0: "exact", 1: "exact"}


def test_ground_truth(rows) -> None:
    assert gone(remove_without_truth(rows(("a", "1"), ("b", None), ("c", "略"), ("d", "0"), ("e", "proof")))) == {
        1: "no_answer",
        2: "no_answer",
    }
    assert gone(remove_without_truth(rows(("a", "1"), unfit="synthetic"))) == {0: "synthetic"}
    outcome = remove_without_truth(rows(("a", "1"), ("b", None), exempt=True))
    assert gone(outcome) == {}
    assert outcome.for_judge == (1,)


CHOICE = [
    ("Which is prime?\nA. 4\nB. 7\nC. 9", "7"),
    (r"Find x. $\textbf{(A)}\ 1\qquad\textbf{(B)}\ 2\qquad\textbf{(C)}\ 3$", "2"),
    ("Pick one: (A) red (B) blue (C) green", "(A)"),
    ("下列说法正确的是（  ）", "B"),
    ("集合A与B的交集为（　　）", "C"),
    ("Which of the following is even?", "D"),
    ("已知 A. 一 B. 二 C. 三 求正确的", "AC"),
]
TRUE_FALSE = [
    ("True or false: every square is a rectangle.", "True"),
    ("判断对错：任何数都大于零。", "错"),
    ("Is 7 prime?", "Yes"),
    ("三角形内角和是180度，对吗？", "对"),
    ("5是质数。（判断）", "√"),
]
PROOF = [
    ("Prove that there are infinitely many primes.", "see solution"),
    ("Let n be odd. Show that n^2-1 is divisible by 8.", "8 divides it"),
    ("已知a>b，求证：a+c>b+c", "略证"),
    ("设f(x)连续。证明：f有最大值。", "proof"),
    ("Sketch it.", "Proof"),
]
OPEN = [
    ("What is 3+4?", "7"),
    ("In triangle $ABC$, points A, B, C. are given; find AB.", "5"),
    ("Following the arrows, how many paths? [asy]label(A);\ndot(A);\ndot(B);\ndot(C);[/asy]", "5"),
    ("求证明书的费用，一共多少元？", "30"),
    ("Show that x=2 and find the value of x+1.", "3"),
    ("已知f(x)，求f(1)的值，证明从略", "2"),
    ("The letter A stands for a digit in AB + BA = 99; which digit is A?", "4"),
    ("How many of the statements are true? Two are.", "2"),
    ("小明做了10道判断题，对了8道，错了几道？", "2"),
    ("If (A) holds, what is x?", "B"),
    ("The proof of the pudding is in the eating; how many puddings?", "3"),
    ("求sin A的值", "A"),
    ("Which of the following numbers is the largest: 3, 5 or 4?", "5"),
    ("已知函数f(x)=x+1，则f(1)=（  ）", "2"),
]


@pytest.mark.parametrize(("entries", "reason"), [(CHOICE, "choice"), (TRUE_FALSE, "true_false"), (PROOF, "proof")])
def test_closed_types_go(rows, entries, reason) -> None:
    assert gone(remove_types(rows(*entries))) == dict.fromkeys(range(len(entries)), reason)


def test_open_questions_stay(rows) -> None:
    assert gone(remove_types(rows(*OPEN))) == {}


def test_the_sets_own_word_counts(rows) -> None:
    assert gone(remove_types(rows(("What is 3+4?", "7"), kind="choice"))) == {0: "choice"}
    outcome = remove_types(rows(("Prove that 1=1.", "proof"), ("Pick: (A) 1 (B) 2 (C) 3", "A"), exempt=True))
    assert gone(outcome) == {}
    assert outcome.for_judge == (0,)


def test_unverifiable_answers_go(rows, options) -> None:
    table = rows(
        ("q", "72"),
        ("q", r"\frac{1}{2}"),
        ("q", "(1, 2]"),
        ("q", "x^2+y^2=2"),
        ("q", "三棱锥、圆锥、三棱柱"),
        ("q", r"\frac{2kn}{n+k-1}-2\frac{k!"),
        ("q", "because all of the apples were eaten"),
        ("q", ""),
        ("q", "5"),
        ("q", "Evelyn"),
        ("q", "5厘米"),
    )
    outcome = remove_unverifiable(table, options)
    reasons = gone(outcome)
    assert {4, 5, 6, 7} == set(reasons)
    assert [reasons[row] for row in (4, 6, 7)] == ["text"] * 3
    assert reasons[5] in ("unreadable", "unequal", "error")
    assert outcome.notes == {"distinct_answers": 11, "asked": 6}


def test_exempt_answers_are_for_the_judge(rows, options) -> None:
    outcome = remove_unverifiable(rows(("q", "三棱锥"), ("r", "7"), exempt=True), options)
    assert gone(outcome) == {}
    assert outcome.for_judge == (0,)


@pytest.mark.parametrize(
    "text", ["", "分层抽样", "x" * 301, "the first one is bigger than the second", "由题意得 x=3 所以答案为三"]
)
def test_texts(text: str) -> None:
    assert is_text(text)


@pytest.mark.parametrize("text", ["7", "5厘米", "x=3", r"\text{Evelyn}", "Monday", "10 square miles", "无解7"])
def test_no_texts(text: str) -> None:
    assert not is_text(text)


FAKE = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    answers = json.loads(line)
    if "hang" in answers:
        time.sleep(60)
    if "die" in answers:
        os._exit(3)
    print(json.dumps(["seen" + str(len(answers)) for _ in answers]), flush=True)
"""


def test_an_answer_that_hangs_or_kills_costs_its_neighbours_nothing(tmp_path: Path, monkeypatch) -> None:
    """The parent's side alone, with a worker that hangs and dies on demand: its group is asked again one by one."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    monkeypatch.setattr(verify_worker, "__file__", str(worker))
    started = time.monotonic()
    found = verify(["a", "hang", "b", "die", *[f"c{n}" for n in range(60)]], 0.3, 2)
    assert found == ["seen1", "timeout", "seen1", "error"] + ["seen1"] * 28 + ["seen32"] * 32
    assert time.monotonic() - started < 15


def test_a_worker_that_does_not_start_is_no_verdict(tmp_path: Path, monkeypatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(4)")
    monkeypatch.setattr(verify_worker, "__file__", str(worker))
    with pytest.raises(RuntimeError, match=r"did not start \(exit code"):
        verify(["1/2"], 1.0, 1)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """A parent that is killed leaves no worker behind, not even one that hangs."""
    import os
    import signal
    import subprocess

    import psutil

    program = (
        "import sys; from curation.steps.verifiable import _Worker; worker = _Worker(); "
        "print(worker._process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGSTOP)  # as good as hanging: it will not see that its input ends
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_every_plain_number_is_read_by_the_library(options) -> None:
    """What `is_plain_number` lets through unasked, math-verify does find equal to itself."""
    numbers = ["0", "72", "-3.5", "+4", "1,000", "12,345,678", ".5", "0.125", "007", "1" * 30, "999,999.99"]
    assert verify(numbers, 10.0, 1) == [""] * len(numbers)
