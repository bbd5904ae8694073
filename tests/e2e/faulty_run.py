"""A run on which something befalls rank 1, or the only one: `python -m tests.e2e.faulty_run FAULT CONFIG …`, under torchrun or
alone.

    update:freeze     it stops itself in the third step's update, as a machine that hangs does, once step 2 is kept: that is
                      written beside, and would hang with it
    update:native     it waits there in C without end, and keeps the interpreter to itself
    update:fail       it raises an error there, of its own alone, while a collective that it began waits for the other rank;
                      and its interpreter's end waits without end
    generate:sleep    its embedded engine sleeps before the second token of the first evaluation

The watch's deadline begins with the first step: on a busy machine the start takes longer than a test should wait later.
"""

import atexit
import ctypes
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from trainer import actor, launch, loop, train

HANG_SECONDS = 600


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def native():
    lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)  # PyDLL holds the interpreter
    lock(mutex)
    lock(mutex)


def fail():
    atexit.register(time.sleep, HANG_SECONDS)
    pending = dist.all_reduce(torch.zeros(1), async_op=True)
    raise ValueError(f"of rank 1 alone, with a collective under way ({pending.is_completed()})")


def sleep():
    time.sleep(HANG_SECONDS)


def in_update(fault):
    plain, calls = actor.linear_policy_loss, []

    def faulty(*arguments):
        calls.append(1)
        if len(calls) == 6:
            while not (LateWatch.run / "checkpoints/step-000002/manifest.json").exists():
                time.sleep(0.02)
            fault()
        return plain(*arguments)

    actor.linear_policy_loss = faulty


def in_generate(fault):
    from rollout.transformers_engine import _EachToken

    plain = _EachToken.__call__

    def faulty(self, *arguments):
        if self._progress is not None and self._count == 1:  # a push's probe shows no progress
            fault()
        return plain(self, *arguments)

    _EachToken.__call__ = faulty


class LateWatch(train.Watch):
    def __init__(self, run, *arguments, seconds, **options):
        super().__init__(run, *arguments, seconds=HANG_SECONDS, **options)
        LateWatch.run = run
        plain = loop.TrainingLoop.train_step

        def from_now_on(self_, step):
            self._seconds = seconds
            return plain(self_, step)

        loop.TrainingLoop.train_step = from_now_on


if __name__ == "__main__":
    place, _, name = sys.argv.pop(1).partition(":")
    train.Watch = LateWatch
    if os.environ.get("RANK", "1") == "1":
        {"update": in_update, "generate": in_generate}[place](globals()[name])
    launch.run(train.main)
