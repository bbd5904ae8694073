"""A run on which something befalls a rank at a stated place: `python -m tests.e2e.faulty_run FAULT CONFIG …`, under torchrun or alone.

update:freeze     rank 1 stops itself, as a machine that hangs does, in the second micro-batch of the second step's update
update:native     rank 1 sleeps there in C, and keeps the interpreter to itself
update:sleep      rank 1 sleeps there, in Python's own sleep
collective:freeze rank 1 stops before a collective of the third step's sampling
generate:sleep    the embedded engine of rank 1 sleeps before its second token
"""

import ctypes
import os
import signal
import sys
import time

import trainer.setup  # noqa: F401 - before the watch begins: on a busy machine it takes as long as a deadline here
from trainer import train

HANG_SECONDS = 600


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def native():
    ctypes.PyDLL(None).sleep(HANG_SECONDS)  # PyDLL: holds the interpreter


def sleep():
    time.sleep(HANG_SECONDS)


def in_update(fault):
    from trainer import actor

    plain = actor.linear_policy_loss
    calls = 0

    def faulty(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            fault()
        return plain(*arguments)

    actor.linear_policy_loss = faulty


def in_collective(fault):
    from rollout.ranks import Ranks

    plain = Ranks.gather

    def faulty(self, value):
        if self.pulse.step == 3:
            fault()
        return plain(self, value)

    Ranks.gather = faulty


def in_generate(fault):
    from rollout import transformers_engine

    plain = transformers_engine._EachToken.__call__

    def faulty(self, *arguments):
        if self._count == 1:
            fault()
        return plain(self, *arguments)

    transformers_engine._EachToken.__call__ = faulty


if __name__ == "__main__":
    place, _, name = sys.argv.pop(1).partition(":")
    if os.environ.get("RANK", "1") == "1":
        {"update": in_update, "collective": in_collective, "generate": in_generate}[place](globals()[name])
    sys.exit(train.main(sys.argv[1:]))
