"""Saves that are killed, for test_checkpoint_kills.py: `checkpoint_kills.py FOLDER` prints a JSON line for each.

The process loads torch once and forks for each kill. The child saves step 3 over the checkpoints of steps 1 and 2 and ends itself
by SIGKILL before its k-th operation on the file system (an open, an fsync, a rename, a removal), for k = 1, 2, … until a save is
through.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
from checkpoint_actor import checkpoints, same, state_at, values_of
from tiny_policy import one_rank
from torch import nn

from trainer import checkpoint_tensors
from trainer.optimizer import make_moments


class OneLayer:
    """As much of an actor as a checkpoint takes."""

    def __init__(self) -> None:
        self.policy, self.updates = nn.Linear(8, 8), 0
        self.optimizer = torch.optim.AdamW(self.policy.parameters())
        make_moments(self.optimizer)

    def update(self) -> None:
        self.policy(torch.ones(8)).square().sum().backward()
        self.optimizer.step()
        self.updates += 1


EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")


def kill_before(k: int, run: Path) -> None:
    """This process, before its k-th operation in `run`."""
    seen = 0

    def count(what: str) -> None:
        nonlocal seen
        seen += 1
        if seen == k:
            os.write(1, (json.dumps({"before": what}) + "\n").encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        # A removal of a whole tree names files by their folder's descriptor.
        if event in EVENTS and (str(run) in str(arguments[0]) or event in ("os.rmdir", "os.remove")):
            count(f"{event} {os.path.basename(str(arguments[0]))}")

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        count("fsync")
        fsync(descriptor)

    os.fsync = counted
    sys.addaudithook(audit)


def hang(actor: OneLayer, run: Path) -> None:
    """A disk that takes nothing and says nothing."""
    checkpoint_tensors.write = lambda *_: threading.Event().wait()
    kept = checkpoints(run, seconds=0.5)
    kept.save(actor, state_at(1))
    kept.finish()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with one_rank():
        actor, base = OneLayer(), folder / "base"
        values = {}
        for step in (1, 2, 3):
            actor.update()
            values[step] = values_of(actor)
            if step < 3:
                checkpoints(base).save(actor, state_at(step), wait=True)
        again = OneLayer()
        k, through = 0, False
        while not through:
            k += 1
            run = folder / "run"
            shutil.copytree(base, run)
            if (child := os.fork()) == 0:
                kept = checkpoints(run, keep=1)
                kill_before(k, run)
                kept.save(actor, state_at(3))
                kept.finish()
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            through = status == 0
            assert through or os.WTERMSIG(status) == signal.SIGKILL
            said: list[str] = []
            kept = checkpoints(run, said.append, keep=1)
            step = kept.resume(again).step
            found = {"k": k, "through": through, "resumed": step, "whole": same(values_of(again), values[step]), "said": said}
            found["left"] = sorted(path.name for path in (run / "checkpoints").iterdir())
            kept.save(actor, state_at(4), wait=True)
            found["then"] = sorted(path.name for path in (run / "checkpoints").iterdir())
            print(json.dumps(found), flush=True)
            shutil.rmtree(run)
        if (child := os.fork()) == 0:
            hang(actor, folder / "hung")
            os._exit(0)
        print(json.dumps({"hung": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
