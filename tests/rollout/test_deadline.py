"""A wait without end gets one, and says where it was: in processes of their own, because it ends them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from rollout.deadline import EXIT_HUNG, Deadline

BOARD = """
import sys, threading, time
from rollout.deadline import Deadline

class Board:
    lines = ["rank 0: push of version 7: its start", "rank 1: start", "rank 2: probe of version 6: its start"]
    def write(self, text):
        self.lines[1] = text
    def read(self):
        return self.lines
"""


def run(program: str, seconds: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BOARD + program], capture_output=True, text=True, timeout=seconds)


def test_a_hang_is_named_with_its_call_its_place_and_the_other_ranks():
    start = time.monotonic()
    ended = run(
        "with Deadline(0.4, 'rank 1: push of version 7', Board()) as deadline:\n"
        "    deadline.at('gathering model.layers.3.mlp.up_proj.weight')\n"
        "    def hung_in_a_collective(): threading.Event().wait()\n"
        "    hung_in_a_collective()\n"
    )
    assert ended.returncode == EXIT_HUNG == 3
    assert time.monotonic() - start < 15
    first, *rest = ended.stderr.splitlines()
    assert first == (
        "keju: error: rank 1: push of version 7: gathering model.layers.3.mlp.up_proj.weight: nothing for 0.4 s"
        "; rank 0: push of version 7: its start; rank 2: probe of version 6: its start"
    )
    assert any("hung_in_a_collective" in line for line in rest), "and where each thread was"


def test_what_goes_on_may_take_longer_in_all():
    ended = run(
        "with Deadline(0.4, 'rank 1: push', Board()) as deadline:\n"
        "    for layer in range(10):\n"
        "        deadline.at(f'layer {layer}')\n"
        "        time.sleep(0.12)\n"
        "print('done', flush=True)\n"
        "time.sleep(1)\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    "board",
    [
        "    def write(self, text): time.sleep(60)\n    def read(self): time.sleep(60)\n",
        "    def write(self, text): raise RuntimeError('gone')\n    def read(self): raise RuntimeError('gone')\n",
    ],
    ids=["does not answer", "is gone"],
)
def test_a_board_that_is_of_no_use_keeps_nobody(board):
    ended = run(
        "import rollout.deadline\n"
        "rollout.deadline.OTHERS_SECONDS = 0.5\n"
        f"class Broken:\n{board}"
        "with Deadline(0.3, 'rank 0: push', Broken()) as deadline:\n"
        "    deadline.at('here')\n"
        "    time.sleep(60)\n"
    )
    assert ended.returncode == EXIT_HUNG
    assert ended.stderr.startswith("keju: error: rank 0: push: here: nothing for 0.3 s\n")


def test_without_a_usable_stderr_it_still_ends():
    ended = run(
        "class Console:\n"
        "    def write(self, text): raise OSError('closed')\n"
        "    def flush(self): raise OSError('closed')\n"
        "sys.stderr = Console()\n"
        "with Deadline(0.3, 'rank 0: push'):\n"
        "    time.sleep(60)\n"
    )
    assert ended.returncode == EXIT_HUNG


def test_the_board_shows_where_each_rank_is():
    class Board:
        def __init__(self) -> None:
            self.lines: list[str] = []

        def write(self, text: str) -> None:
            self.lines.append(text)

        def read(self) -> list[str]:
            return self.lines

    board = Board()
    with Deadline(0.2, "rank 0: push of version 1", board) as deadline:
        for place in ("gathering a", "sending a"):
            deadline.at(place)
            time.sleep(0.15)
    assert board.lines[-1] == "rank 0: push of version 1: sending a"
    assert "rank 0: push of version 1: gathering a" in board.lines


def test_it_leaves_no_thread_and_an_exception_passes():
    before = set(threading.enumerate())
    with pytest.raises(KeyError), Deadline(30, "rank 0: push"):
        raise KeyError("x")
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) - before == set()
