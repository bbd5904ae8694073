"""Answers that hang by the thousand or take memory without end: bounded, said, and nothing of them is left."""

import os
import re
import resource
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rollout.reward import rule_worker
from rollout.reward.checker import Checker
from rollout.reward.rule import RuleVerifier
from rollout.reward.rules import RULES, Rule
from rollout.types import Prompt

HANGS, BATCHES, BATCH_SECONDS = 1000, 4, 5.0
WORKERS = 2


def held():
    """(processes below this one without multiprocessing's tracker, open files, threads, files in /dev/shm that are not held by
    processes of others, as another tester's)."""
    below = psutil.Process().children(recursive=True)
    workers = [child for child in below if "resource_tracker" not in " ".join(child.cmdline())]
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    if shared:
        ours = {os.getpid(), *(child.pid for child in below)}
        shared -= set().union(*(shared_by(pid) for pid in psutil.pids() if pid not in ours))
    return len(workers), len(os.listdir("/proc/self/fd")), threading.active_count(), len(shared)


def shared_by(pid):
    """Names in /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return set()
    return set(re.findall(r" /dev/shm/(.+)$", maps, re.MULTILINE))


def settled(wanted, seconds=10.0):
    """What is held, once it is no more than `wanted`, or after so long."""
    end = time.monotonic() + seconds
    while any(now > then for now, then in zip(held(), wanted, strict=True)) and time.monotonic() < end:
        time.sleep(0.1)
    return held()


@pytest.mark.skipif(sys.platform != "linux", reason="counts are read from /proc")
def test_a_thousand_hanging_answers_end_in_time_and_leave_nothing():
    with RuleVerifier("math-verify", WORKERS, timeout_seconds=2.0, batch_seconds=BATCH_SECONDS) as verifier:
        verifier.verify([(Prompt("warm", "q", "1"), "2")])
        before = held()
        for batch in range(BATCHES):
            tops = range(9 + batch * HANGS // BATCHES, 9 + (batch + 1) * HANGS // BATCHES)
            pairs = [(Prompt(f"h{top}", "q", "7"), rf"$9^{{9^{{9^{{{top}}}}}}}$") for top in tops]
            pairs[100:100] = [(Prompt(f"g{number}", "q", str(number)), str(number)) for number in range(batch, batch + 20)]
            verifier.verify([(Prompt("ready", "q", f"{batch}"), f"{batch} + x")])  # a worker is ready: from here the time counts
            started = time.monotonic()
            verdicts = verifier.verify(pairs)
            assert time.monotonic() - started < BATCH_SECONDS + 1
            assert all(verdict.reason == "right" for verdict in verdicts[100:120])
            others = {verdict.reason for verdict in verdicts[:100] + verdicts[120:]}
            assert others <= {"timeout", "unjudged"}
            assert "timeout" in others
        now = settled(before)
        assert all(after <= then for after, then in zip(now, before, strict=True)), f"{before} before, {now} after"
    assert held()[0] == 0


def bomb(kind):
    """What an answer could make a scorer do."""
    if kind == "memory":
        taken = []
        while True:
            taken.append(bytearray(2**24))
    for _ in range(10):
        os.fork()


def score(kind):
    try:
        bomb(kind)
    except BaseException as error:
        return type(error).__name__
    return "went off"


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(("kind", "said"), [("memory", "MemoryError"), ("fork", "PermissionError")])
def test_a_bomb_is_refused_and_said(kind, said):
    """In a process of its own under the worker's limits, of which the one on memory is small here."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            rule_worker._limit_memory(resident_data() + 2**28)
            checker = Checker(score)
            outcome = checker.call(20.0, 20.0, kind)
            checker.close()
            code = 0 if outcome == said else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert held()[0] == 0


def resident_data():
    """Bytes that RLIMIT_DATA counts of this process now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmData:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(("gib", "allowed"), [(8, 2), (24, 6), (2048, 8)])
def test_a_worker_may_not_take_the_machine(monkeypatch, gib, allowed):
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.update({which: pair[0]}))
    monkeypatch.setattr(rule_worker, "memory_of_machine", lambda: gib * 2**30)
    for name in ("die_with", "Checker"):
        monkeypatch.setattr(rule_worker, name, lambda *_: None)
    monkeypatch.setattr(rule_worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(rule_worker.gc, "freeze", lambda: None)
    monkeypatch.setattr(rule_worker, "_checker", None, raising=False)
    monkeypatch.setitem(RULES, "light", Rule(lambda *_: (True, "right", "")))
    rule_worker.start("light", os.getppid())
    assert limits == {resource.RLIMIT_DATA: allowed * 2**30}
