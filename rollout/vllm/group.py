"""One vLLM over the devices of several ranks (tensor parallel), as each of these ranks sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from rollout.engine import Decoding, EngineError, Generation, Progress, Request
from rollout.vllm.engine import VllmEngine
from rollout.weights.source import WeightSource


class GroupMember:
    """`rollout.engine.Engine`. The group's first rank holds the engine and asks it for everything that the group samples; the
    others lend it their devices, take part in the collectives of a push, and are given nothing to sample.

    engine: None on the others. meet: a collective of all ranks.
    """

    name = "vllm"
    streams = True

    def __init__(self, engine: VllmEngine | None, meet: Callable[[], object]) -> None:
        self._engine, self._meet = engine, meet
        self._version: int | None = None

    @property
    def version(self) -> int | None:
        return self._version if self._engine is None else self._engine.version

    @property
    def pid(self) -> int | None:
        """Of the process that holds vLLM; None where another rank's child does."""
        return None if self._engine is None else self._engine.pid

    def ready(self) -> None:
        """See `rollout.engine.Engine.ready`."""
        if self._engine is not None:
            self._engine.ready()

    def load(self, version: int, source: WeightSource) -> None:
        """See `rollout.engine.Engine.load`."""
        if self._engine is not None:
            self._engine.load(version, source)
            return
        self._version = None
        deque(source, maxlen=0)  # keeps none of them while the next is gathered
        self._version = version

    def submit(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> Generation:
        """See `rollout.engine.Engine.submit`."""
        if self._engine is None:
            raise EngineError("this rank lends its device to another's vLLM, and has none to ask")
        return self._engine.submit(requests, decoding, progress)

    def sleep(self) -> None:
        """See `rollout.engine.Engine.sleep`. Returns when the memory of every rank's device has been given back."""
        if self._engine is not None:
            self._engine.sleep()
        else:
            self._version = None
        self._meet()

    def restart(self) -> None:
        """See `rollout.engine.Engine.restart`."""
        self._version = None
        if self._engine is not None:
            self._engine.restart()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
