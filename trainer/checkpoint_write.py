"""One checkpoint on its way to the disk, in a thread of each rank beside the loop.

    all     the index and this rank's shards, to the disk                  (torch.distributed.checkpoint)
    all     checksums of the files this rank wrote; rank 0 also the run's state
    rank 0  the manifest, the rename, then what is not kept any more

The threads meet in a group of their own. Where one fails, all do, with the same text, and rank 0 removes what was written: until
the rename nothing else is touched.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from rollout.deadline import Deadline
from rollout.ranks import Ranks
from trainer import checkpoint_tensors
from trainer.checkpoint_folder import ARRAYS, STATE, UNFINISHED, Files, create, describe, name_of, publish
from trainer.checkpoint_state import Packed


class SaveFailed(Exception):
    """The machine did not take a checkpoint. The same text on all ranks."""


@dataclass(frozen=True, slots=True)
class Content:
    """Of one checkpoint, on one rank. Nobody else changes it."""

    step: int
    tensors: dict[str, Tensor]
    random_state: np.ndarray
    packed: Packed | None
    """On rank 0."""


class Write(threading.Thread):
    """ranks: over a group of their own. seconds: the process ends, saying where, if a part of it takes longer. retain: called on
    rank 0 when the checkpoint stands."""

    def __init__(self, folder: Path, content: Content, ranks: Ranks, seconds: float, retain: Callable[[], None]) -> None:
        # A daemon: what waits for it is the loop, whatever ends it (`Checkpoints.__exit__`), and not the interpreter.
        super().__init__(name="keju-checkpoint", daemon=True)
        self.step = content.step
        self._final = folder / name_of(content.step)
        self._beside = self._final.with_name(self._final.name + UNFINISHED)
        self._content, self._ranks, self._seconds, self._retain = content, ranks, seconds, retain
        self.fault: BaseException | None = None
        """SaveFailed, or a defect."""
        self.took = 0.0
        """Seconds."""
        self.bytes = 0
        """Of all ranks; on rank 0."""

    def run(self) -> None:
        start = time.perf_counter()
        call = f"rank {self._ranks.rank}: checkpoint of step {self.step}"
        try:
            with Deadline(self._seconds, call, self._ranks.board) as deadline:
                self._write(deadline)
        except BaseException as error:
            self.fault = error
        self.took = time.perf_counter() - start
        del self._content

    def _write(self, deadline: Deadline) -> None:
        first, content = self._ranks.first, self._content
        try:
            deadline.at("making its folder")
            self._together(lambda: create(self._beside) if first else None)
            deadline.at("writing shards")
            self._write_tensors()
            deadline.at("checksums")
            random_states = self._ranks.gather(content.random_state)
            files = self._together(lambda: self._describe(random_states))
            deadline.at("the manifest")
            merged = {name: facts for each in files for name, facts in each.items()}
            self._together(lambda: publish(self._beside, self._final, merged) if first else None)
        except SaveFailed:
            if first:
                shutil.rmtree(self._beside, ignore_errors=True)  # what remains is never read, and goes with the next save
            raise
        self.bytes = sum(facts["bytes"] for facts in merged.values())
        deadline.at("retention")
        if first:
            self._retain()

    def _write_tensors(self) -> None:
        try:
            checkpoint_tensors.write(self._content.tensors, self._beside, self._ranks)
        except CheckpointException as error:
            faults = {rank: fault for rank, (fault, _) in error.failures.items()}
            if all(isinstance(fault, OSError) for fault in faults.values()):
                raise SaveFailed(self._said(faults)) from None
            raise

    def _describe(self, random_states: list[np.ndarray] | None) -> Files:
        files = checkpoint_tensors.files_of(self._ranks.rank, self._beside)
        if self._content.packed is not None:
            self._content.packed.write(self._beside, random_states)
            files += [self._beside / STATE, self._beside / ARRAYS]
        return describe(self._beside, files)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gave on each rank. Raises SaveFailed on all where the machine refused it on one; a defect is raised where
        it is, and told to the others."""
        value, fault = None, None
        try:
            value = work()
        except BaseException as error:
            fault = error
        told = fault if fault is None or isinstance(fault, OSError) else RuntimeError(repr(fault))
        outcomes = self._ranks.all_gather((value, told))
        if fault is not None and not isinstance(fault, OSError):
            raise fault
        faults = {rank: told for rank, (_, told) in enumerate(outcomes) if told is not None}
        for rank, each in faults.items():
            if not isinstance(each, OSError):
                raise RuntimeError(f"rank {rank}: {each}")
        if faults:
            raise SaveFailed(self._said(faults))
        return [value for value, _ in outcomes]

    def _said(self, faults: dict[int, OSError]) -> str:
        rank, fault = next(iter(faults.items()))
        where = f" ({fault.filename})" if fault.filename else ""
        return (f"rank {rank}: " if self._ranks.size > 1 else "") + f"{fault.strerror or fault}{where}"


def random_state() -> np.ndarray:
    """This rank's, of torch on the host."""
    return torch.get_rng_state().numpy()
