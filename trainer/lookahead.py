"""One step off: the next step is sampled in a thread of each rank while this one trains.

    step k:  take the batch that was sampled under version k - 1  →  push version k  →  start sampling step k + 1  →  train

A run that is stopped and goes on samples its first batch from the weights of then, so its later steps are not those that it would
have had; its ledger is kept as ever.

So every response is one policy step old when it is trained on, and a recovered one two. The paper's algorithm is on-policy but
for what RSR recovers; this mode is a different one (docs/rollout.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rollout.errors import EngineError
from rollout.sampler import Collected, SamplingStalled, SamplingStopped
from trainer.checkpoint_state import RunState


class Lookahead:
    """At most one batch under way. `before`: the run's state when its sampling began, from which a run must continue that did not
    train it. stir: called while the main thread waits for it, which has its own deadlines."""

    def __init__(self, stir: Callable[[], object] = lambda: None) -> None:
        self._stir = stir
        self._thread: threading.Thread | None = None
        self._outcome: Collected | BaseException | None = None
        self.before: RunState | None = None

    @property
    def started(self) -> bool:
        return self._thread is not None

    def start(self, before: RunState, collect: Callable[[], Collected]) -> None:
        def work() -> None:
            try:
                self._outcome = collect()
            except BaseException as error:
                self._outcome = error

        self.before = before
        self._thread = threading.Thread(target=work, name="keju-lookahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is sampled; the batch stays here, and so does what ends it on every rank alike. Raises what ended it on this
        rank alone, a defect: the others wait for this one, and must see it go."""
        if self._thread is None:
            return
        while self._thread.is_alive():
            self._thread.join(1.0)
            self._stir()
        if isinstance(self._outcome, BaseException) and not isinstance(
            self._outcome, (EngineError, SamplingStalled, SamplingStopped)
        ):
            raise self._outcome

    def take(self) -> Collected:
        """The batch. Raises what its sampling raised."""
        self.wait()
        outcome, self._outcome, self._thread = self._outcome, None, None
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def quiet_beside(phase: Callable[..., AbstractContextManager]) -> Callable[..., AbstractContextManager]:
    """The console's `phase` in the main thread, nothing in another: it shows one phase at a time."""

    def quiet(*arguments: Any) -> AbstractContextManager:
        return phase(*arguments) if threading.current_thread() is threading.main_thread() else nullcontext(_Nothing())

    return quiet


class _Nothing:
    def advance(self, n: int = 1, **facts: object) -> None:
        pass
