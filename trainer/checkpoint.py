"""Checkpoints: everything a run needs to continue as if it had not stopped.

    RUN/checkpoints/step-000010/
        dcp/                weights and moments, sharded as on the ranks; any number of ranks reads them    checkpoint_tensors.py
        state.json          step, prompt cursors, ledger, recovery buffer                                   checkpoint_state.py
        arrays.safetensors  the recovery buffer's tokens; each rank's random state
        manifest.json       size and SHA-256 of every other file                                            checkpoint_folder.py

A save copies what must survive to host memory and returns; a thread of each rank writes the copy beside (checkpoint_write.py),
flushes it to the disk and renames it. So a folder without the suffix .tmp is whole, and a kill at any instant leaves the one
before. One is written at a time: a save that comes while another is being written waits for it.

A disk that is full or refuses fails that save alone, on all ranks; the run goes on and says so, but not for ever, and not where
it would end without what it learnt. Sampling and data order draw from seeds derived from (run seed, step, …), so the saved random
state is a precaution and not what repeatability rests on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer import checkpoint_state, checkpoint_tensors
from trainer.actor import Actor
from trainer.checkpoint_folder import (
    best_of,
    clear_unfinished,
    damage,
    discard,
    folders_of,
    free_bytes,
    kept,
    name_of,
    newest_of,
    step_of,
)
from trainer.checkpoint_state import Packed, RunState
from trainer.checkpoint_write import Content, SaveFailed, Write, random_state
from trainer.config import CheckpointConfig

__all__ = ["Checkpoints", "RunState"]

GROUP_GRACE = 60.0
"""Seconds by which a wait for the other ranks' threads outlives checkpoint.seconds, so that the deadline speaks first."""
PULSE_SECONDS = 1.0
"""Between two signs of life while the loop waits for a write."""
ROOM = 1 << 20
"""Bytes beside tensors and state that must be free."""
MEND = "free space there or lower checkpoint.keep, or mend what the system says"


class Checkpoints:
    """Of one run folder; a context, at whose end what is being written is finished. All methods but `measured` are
    collectives.

    note: where to say that a checkpoint was skipped, or that a save failed. score: of a step, for keep_best; asked on rank 0.
    """

    def __init__(
        self, run: Path, ranks: Ranks, config: CheckpointConfig, note: Callable[[str], None],
        score: Callable[[int], float | None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._folder = run / "checkpoints"
        self._ranks, self._config, self._note, self._score = ranks, config, note, score
        self._writers = ranks.another(config.seconds + GROUP_GRACE)
        self._staging = checkpoint_tensors.Staging()
        self._writing: Write | None = None
        self._known: set[int] | None = None
        """Steps whose folders were there at the start, or are this start's. Others came since, from a disk mounted late, say."""
        self._told: set[int] = set()
        """Of those others."""
        self._stands: int | None = None
        """The newest step that is on the disk."""
        self._failed: SaveFailed | None = None
        """The last save, if it failed."""
        self._failed_in_a_row = self._failed_ever = 0
        self._defect: BaseException | None = None
        self._measured: dict[str, float] = {}

    def save(self, actor: Actor, state: RunState, wait: bool = False, hindrance: str | None = None) -> None:
        """Writes a checkpoint for `state.step`, of the values of now, or does nothing where it stands. hindrance: why it must not
        stand, on rank 0; a save that fails.

        wait: until it stands. Raises InputError where it then does not, or after `max_failures` saves in a row that failed.
        """
        start = time.perf_counter()
        self._settle()
        if not wait:
            self._give_up()
        if state.step != self._stands:
            self._save(actor, state, wait or not self._config.asynchronous, hindrance)
        self._measured["time/checkpoint"] = time.perf_counter() - start
        if wait and self._failed is not None:
            raise self._ended()
        self._give_up()

    def finish(self) -> None:
        """Waits for what is being written. Raises InputError where the last save failed."""
        self._settle()
        if self._failed is not None:
            raise self._ended()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Where something else ends the run, a save that fails is said and hides nothing."""
        if error is None:
            self.finish()
        elif self._writing is not None:
            self._take()
            if self._defect is not None:
                self._note(f"the checkpoint that was being written failed too: {self._defect!r}")

    def measured(self) -> dict[str, float]:
        """What is new since the last call: seconds that the last save held the loop up, seconds that the last write took, its
        bytes, and how many saves of this process have failed."""
        if self._writing is not None and not self._writing.is_alive():
            self._take()
        measured, self._measured = self._measured, {}
        return measured

    def resume(self, actor: Actor) -> RunState:
        """Restores the newest complete checkpoint into `actor` and gives its state; a fresh state where there is none.

        Raises InputError where there are checkpoints and none is whole, or where it is another model's or another format's.
        """
        folder = self._newest()
        if folder is None:
            return RunState()
        state, updates, random_states = checkpoint_state.read(folder)
        checkpoint_tensors.read(checkpoint_tensors.tensors_of(actor), folder, self._ranks)
        actor.updates = updates
        if len(random_states) == self._ranks.size:
            torch.set_rng_state(torch.from_numpy(random_states[self._ranks.rank]))
        self._stands = state.step
        return state

    def _newest(self) -> Path | None:
        """The newest checkpoint that its manifest confirms. Each rank reads a share of the files: with hundreds of GB one alone
        would take longer than the others may wait. Raises InputError where there are some and none is whole."""
        folders, fault = self._ranks.broadcast(self._listed() if self._ranks.first else None)
        if fault is not None:
            raise InputError(fault)
        self._known = {step_of(folder) for folder in folders}
        return newest_of(self._folder, folders, self._damage, self._note if self._ranks.first else lambda _: None)

    def _listed(self) -> tuple[list[Path], str | None]:
        try:
            return folders_of(self._folder), None
        except InputError as error:
            return [], str(error)

    def _damage(self, folder: Path) -> str | None:
        mine = damage(folder, self._ranks.rank, self._ranks.size, self._ranks.pulse.stir)
        return next((found for found in self._ranks.all_gather(mine) if found is not None), None)

    def _save(self, actor: Actor, state: RunState, wait: bool, hindrance: str | None = None) -> None:
        """wait: nothing changes meanwhile, so the policy's own memory is written."""
        tensors = checkpoint_tensors.tensors_of(actor)
        packed = checkpoint_state.pack(state, actor.updates, self._ranks.size) if self._ranks.first else None
        if packed is not None:
            hindrance = hindrance or self._refusal(tensors, packed, state.step)
        fault = self._ranks.broadcast(hindrance)
        if fault is not None:
            self._count(state.step, SaveFailed(fault))
            return
        held = tensors if wait else self._staging.copy(tensors)
        content = Content(state.step, held, random_state(), packed)
        step = state.step  # not the state itself, which its owner may change
        write = Write(self._folder, content, self._writers, self._config.seconds, lambda: self._retain(step))
        write.start()
        self._writing = write
        if wait:
            self._settle()

    def _refusal(self, tensors: dict[str, Tensor], packed: Packed, step: int) -> str | None:
        """Why a checkpoint cannot be written, before anything is copied."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._known is None:  # nobody asked to resume
                self._known = {step_of(folder) for folder in folders_of(self._folder)}
            if step not in self._known and (self._folder / name_of(step)).exists():
                return f"{self._folder / name_of(step)} is there, and is not this run's: move it away"
            clear_unfinished(self._folder)
            needed, free = checkpoint_tensors.bytes_of(tensors, self._ranks.size) + packed.nbytes + ROOM, free_bytes(self._folder)
        except InputError as error:
            return str(error)
        except OSError as error:
            return f"{error.strerror} ({error.filename})"
        return f"{self._folder} has {free / 1e9:.3g} GB free, and it takes {needed / 1e9:.3g} GB" if free < needed else None

    def _settle(self) -> None:
        """Waits for what is being written. Raises its defects."""
        if self._writing is not None:
            self._take()
        if self._defect is not None:
            raise self._defect

    def _take(self) -> None:
        """What came of a write, once."""
        while self._writing.is_alive():
            self._writing.join(PULSE_SECONDS)
            self._ranks.pulse.stir()  # the write has a deadline of its own
        write, self._writing = self._writing, None
        if isinstance(write.fault, SaveFailed):
            self._count(write.step, write.fault)
        elif write.fault is not None:
            self._defect = write.fault
        else:
            self._stands, self._failed, self._failed_in_a_row = write.step, None, 0
            self._measured |= {"time/checkpoint_write": write.took, "checkpoint/bytes": write.bytes}
            self._measured["checkpoint/failed"] = self._failed_ever

    def _count(self, step: int, failed: SaveFailed) -> None:
        self._failed = SaveFailed(f"checkpoint of step {step} failed: {failed}: {MEND}")
        self._failed_in_a_row, self._failed_ever = self._failed_in_a_row + 1, self._failed_ever + 1
        self._measured["checkpoint/failed"] = self._failed_ever
        self._note(f"{self._failed}; the last good one is {self._last_good()}")

    def _give_up(self) -> None:
        """Raises InputError where too many saves have failed."""
        if self._failed_in_a_row >= self._config.max_failures:
            raise self._ended()

    def _ended(self) -> InputError:
        return InputError(f"{self._failed}; the same command continues from the last good one, {self._last_good()}")

    def _last_good(self) -> str:
        return "none" if self._stands is None else name_of(self._stands)

    def _retain(self, newest: int) -> None:
        """On rank 0, when `newest` stands."""
        self._known.add(newest)
        try:
            folders = {step_of(folder): folder for folder in folders_of(self._folder)}
            for step in sorted(folders.keys() - self._known - self._told):
                self._told.add(step)
                self._note(f"{folders[step]} was not there when this run started, and is not its own: left alone")
            ours = {step: folder for step, folder in folders.items() if step in self._known}
            best = best_of([step for step in ours if step <= newest], self._score) if self._config.keep_best else None
            stay = kept(list(ours), newest, last=self._config.keep, every=self._config.keep_every, best=best)
            for step, folder in ours.items():
                if step not in stay:
                    discard(folder)
        except InputError as error:
            self._note(f"no old checkpoint is removed: {error}")
        except OSError as error:
            self._note(
                f"an old checkpoint cannot be removed: {error.strerror} ({error.filename}); mend that before the disk is full"
            )
