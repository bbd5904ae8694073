"""Who is named, from what the ranks said last and what the system says of their processes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from rollout import process
from trainer.hang_report import Health, Seen, culprits, inspect, main_thread, readable, report, sentence

IN_COLLECTIVE = """\
Thread 0x00007fa5fad296c0 (most recent call first):
  File "/keju/trainer/watch.py", line 198 in _post
  File "/usr/lib/python3.11/threading.py", line 982 in run

Thread 0x00007fa5fad296c1 (most recent call first):
  File "/keju/rollout/lane.py", line 7 in _judge_all

Current thread 0x00007fa61d449b80 (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 4394 in all_gather_single
  File "<frozen importlib._bootstrap>", line 241 in _call_with_frames_removed
  File "/keju/trainer/actor.py", line 175 in update
"""
ELSEWHERE = """\
Thread 0x00007fa5fad296c1 (most recent call first):
  File "/site-packages/torch/distributed/elastic.py", line 7 in other

Thread 0x00007fa61d449b80 (most recent call first):
  File "/keju/trainer/actor.py", line 175 in update
"""


def rank(number: int, sequence: int = 100, *, state: str | None = "S", silent: float = 300.0, stack: str = "", **known) -> Seen:
    quiet = known.pop("quiet", 0.5)
    health = Health(number, "alpha", 10 + number, 1, step=7, phase="update", place="micro-batch 3", sequence=sequence,
                    silent=silent - quiet, **known)  # fmt: skip
    return Seen(health, state, quiet, "futex_wait_queue", stack)


def numbers(ranks: list[Seen]) -> list[int]:
    return [each.health.rank for each in culprits(ranks)[0]]


def test_the_rank_with_the_lowest_sequence_keeps_the_others_waiting():
    ranks = [rank(0, 1236), rank(1, 1234), rank(2, 1236)]
    assert numbers(ranks) == [1]
    assert sentence(ranks) == (
        "rank 1 (alpha, pid 11): in 'update', step 7, micro-batch 3, sequence 1234, behind the others by 2, silent for 300 s: "
        "waiting in the kernel's futex_wait_queue"
    )
    assert numbers([rank(0, 9), rank(1, 7), rank(2, 7)]) == [1, 2]
    assert sentence([rank(0, 9), rank(1, 7), rank(2, 7)]).endswith("; likewise rank 2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "T"}, "frozen (state T)"),
        ({"state": None}, "its process is gone"),
        ({"state": "Z"}, "its process is gone"),
        ({"quiet": 40.0}, "alive, and no Python thread of it had a turn for 40 s (native code holds the interpreter)"),
    ],
)
def test_a_process_that_cannot_go_on_is_named_whatever_the_numbers_say(changes, said):
    ranks = [rank(0, 98), rank(1, 99), rank(2, 100, **changes)]
    assert numbers(ranks) == [2]
    assert said in sentence(ranks)


def test_a_dead_process_before_a_frozen_one_and_that_before_one_that_says_nothing():
    ranks = [rank(0, quiet=40.0), rank(1, state="T"), rank(2, state=None)]
    assert numbers(ranks) == [2]
    assert numbers(ranks[:2]) == [1]


def test_a_rank_that_has_ended_is_no_culprit():
    assert numbers([rank(0, 100), rank(1, 90, end="ended", state=None), rank(2, 99)]) == [2]


def test_with_equal_numbers_the_one_that_waits_in_no_collective():
    ranks = [rank(0, stack=IN_COLLECTIVE), rank(1, stack=ELSEWHERE), rank(2, stack=IN_COLLECTIVE)]
    assert numbers(ranks) == [1]
    assert sentence(ranks).endswith("(it alone waits in no collective)")


def test_with_nothing_to_tell_them_apart_the_longest_silent_is_named_and_the_doubt_is_said():
    ranks = [rank(0, stack=IN_COLLECTIVE), rank(1, stack=IN_COLLECTIVE, silent=400)]
    assert numbers(ranks) == [1]
    assert sentence(ranks).endswith("(no rank is behind another: their stacks below must tell)")
    assert "behind" not in sentence([rank(0)]), "alone there is no doubt"


def test_a_rank_on_another_host_is_not_looked_for_here():
    """Its pid may be anybody's on this one."""
    here = Health(0, "alpha", os.getpid(), process.birth(os.getpid()), said=90.0)
    assert inspect(here, here, 100.0).state in ("R", "S")
    assert inspect(here, here, 100.0).quiet == 10.0
    for other in (replace(here, host="beta"), replace(here, space="another container of a host of that name")):
        assert inspect(here, other, 100.0).state == "?"
        assert not inspect(here, other, 1e9).mute, "nor is its clock ours"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_pid_that_another_process_has_now_is_not_it():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        health = Health(1, "alpha", child.pid, process.birth(child.pid))
        assert not inspect(health, health, 0.0).dead
        assert inspect(replace(health, born=health.born - 1), health, 0.0).dead
        assert process.alive(child.pid, health.born)
        assert not process.alive(child.pid, health.born - 1), "nor would it be killed"
        process.kill(child.pid, health.born)
        assert child.wait(10) == -9
    assert not process.alive(child.pid, health.born)


def test_the_report_reads_from_the_sentence_to_the_stacks():
    ranks = [rank(0, 100, stack=IN_COLLECTIVE), rank(1, 99, state="T")]
    lines = report(ranks, 3, "rank 0 has not got on for 300 s", "2026-01-02 03:04:05 UTC").splitlines()
    assert lines[0] == sentence(ranks)
    assert lines[2] == "Alarm of 2026-01-02 03:04:05 UTC: rank 0 has not got on for 300 s"
    assert lines[4].split() == ["rank", "host", "pid", "state", "step", "phase", "at", "waits", "for", "sequence", "silent"]
    assert lines[5].split() == ["0", "alpha", "10", "S", "7", "update", "micro-batch", "3", "-", "100", "300", "s"]
    assert lines[6].split()[:4] == ["1", "alpha", "11", "T"]
    assert lines[7].split() == ["2", "has", "not", "said", "anything", "yet"]
    text = "\n".join(lines)
    assert "Stack of rank 0" in text
    assert "no stack came (frozen (state T))" in text


def test_a_stack_is_shown_with_the_main_thread_first_and_without_those_that_watch():
    shown = readable(IN_COLLECTIVE)
    assert shown.startswith("Current thread")
    assert "_judge_all" in shown
    assert "_post" not in shown
    assert "importlib" not in shown
    assert "all_gather_single" in main_thread(IN_COLLECTIVE)
    assert "_judge_all" not in main_thread(IN_COLLECTIVE)
    assert readable("") == ""
