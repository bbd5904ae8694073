"""Sends a model through two buffers: while the engines load one chunk, the next is gathered and written.

At most one tensor is whole on the trainer's side at a time, beside the two buffers; a chunk is one layer, or as many as fit, so a
buffer is the largest of: the chunk size asked for, a layer, the embedding.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from rollout.errors import EngineError
from rollout.weights.source import TensorMeta, WeightSource
from rollout.weights.transport import Buffer, SharedMemory, Transport
from rollout.weights.wire import Place, Wire, largest, plan, write

BUFFERS = 2


class Receiver(Protocol):
    """An engine's end of a push. Every method waits until the engine has done it, and raises EngineError where it refuses, dies
    or is late; after that nothing more is asked of it. Its methods are called from one thread, not the caller's."""

    name: str
    workers: int
    """Its processes that each take every chunk (tensor and data parallel); asked for by a broadcast alone."""
    identity: Hashable
    """Another one once its engine was started anew and so has forgotten what `connect` said; asked for by a broadcast alone."""

    def begin(self, version: int, manifest: list[dict[str, Any]]) -> None:
        """manifest: {"name", "shape"} of every tensor that will come. The engine's version is unknown from here on."""
        ...

    def connect(self, info: dict[str, Any]) -> None:
        """Joins a broadcast's group (`rollout.weights.broadcast.Meeting`, for vLLM's init_weight_transfer_engine) with all its
        workers, leaving the one before. Comes behind `begin`, and only where chunks are broadcast and the group is a new one.
        All engines are asked at once and wait for each other, at most info["seconds"]."""
        ...

    def chunk(self, chunk: dict[str, Any]) -> None:
        """Checks and loads one chunk (`rollout.weights.wire`); its buffer may be overwritten afterwards. {"abandon": why} in its
        place ends the push: the engine refuses it and can begin another."""
        ...

    def commit(self, version: int) -> None:
        """All has come: finish, drop caches, and sample from `version` from here on."""
        ...


class Sender:
    """The trainer's end, on one rank. Buffers are made at the first push and kept.

    dtype: the engines'. least_bytes: of a chunk, where a layer is smaller. transport: shared memory unless another is given.
    """

    def __init__(self, dtype: torch.dtype, wire: Wire, least_bytes: int, transport: Transport | None = None) -> None:
        self._dtype, self._wire, self._least_bytes = dtype, wire, least_bytes
        self._transport = transport or SharedMemory()
        self._buffers: list[Buffer] = []

    def send(self, version: int, source: WeightSource, receivers: Sequence[Receiver]) -> dict[str, EngineError | ValueError]:
        """One push to all `receivers`; returns what went wrong, by receiver name. Without receivers it only iterates the source,
        for the ranks that do.

        Raises ValueError where the source does not yield what it announced, EngineError where there is no room for buffers;
        whatever happens, the source is iterated to its end, no thread is left, and an engine that did not commit has no version.
        """
        tensors, errors, failure = iter(source), {}, None
        try:
            if receivers:
                errors = self._push(version, source.metadata(), tensors, receivers)
        except Exception as error:
            failure = error
        # Making a tensor whole is a collective: the other ranks wait for this one in each that is left.
        deque(tensors, maxlen=0)  # keeps none of them while the next is gathered
        if failure is not None:
            raise failure
        return errors

    def close(self) -> None:
        self._release()
        self._transport.close()

    def _push(
        self, version: int, metadata: list[TensorMeta], tensors: Iterator[tuple[str, Tensor]], receivers: Sequence[Receiver]
    ) -> dict[str, EngineError | ValueError]:
        chunks = plan(metadata, self._dtype, self._wire, self._least_bytes)
        buffers = self._buffers_of(min(BUFFERS, len(chunks)), largest(chunks))
        manifest = [{"name": meta.name, "shape": list(meta.shape)} for meta in metadata]
        with Lanes(receivers) as lanes:
            lanes.call("begin", version, manifest)
            self._transport.meet(lanes)
            for number, places in enumerate(chunks):
                buffer = buffers[number % BUFFERS]
                lanes.wait(BUFFERS - 1)  # then the chunk that lay in this buffer is loaded
                if lanes.over:
                    break
                lanes.call("chunk", _written(places, tensors, buffer))
            else:
                if (extra := next(tensors, None)) is not None:
                    raise ValueError(f"weights: {extra[0]} came behind the last that was announced")
                lanes.call("commit", version)
        return lanes.errors()

    def _buffers_of(self, count: int, nbytes: int) -> list[Buffer]:
        """Those of the push before, where they are enough."""
        if len(self._buffers) < count or any(buffer.nbytes < nbytes for buffer in self._buffers):
            self._release()  # before there are others
            for _ in range(count):
                self._buffers.append(self._transport.buffer(nbytes))
        return self._buffers

    def _release(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []


class Lanes:
    """The receivers of one push, each called in a thread of its own. A context manager: leaving it waits for every call; leaving
    it by an exception, or where the push was given up, tells those that know of no error yet to abandon it."""

    def __init__(self, receivers: Sequence[Receiver]) -> None:
        self.receivers = list(receivers)
        self._lanes = [_Lane(receiver, self._on_error) for receiver in receivers]
        self._root: _Lane | None = None
        self._given_up = False

    @property
    def failed(self) -> bool:
        """Whether one failed."""
        return any(lane.error is not None for lane in self._all())

    @property
    def over(self) -> bool:
        """Whether nobody takes anything more."""
        return self._given_up or all(lane.error is not None for lane in self._lanes)

    def call(self, method: str, *arguments: Any) -> None:
        """Each receiver's, behind those before; nothing for one that failed."""
        for lane in self._all():
            self._submit(lane, method, arguments)

    def connect(self, infos: Sequence[dict[str, Any]], own: Any) -> None:
        """Each receiver's `connect`, with its own info, and the trainer's own beside them."""
        for lane, info in zip(self._all(), [*infos, own], strict=True):
            self._submit(lane, "connect", (info,))

    def stand_together(self, root: Any) -> None:
        """From here on the first that fails ends the push for all. root: the trainer's own end, called as the receivers are;
        where the push ends so, `stop` is called at once and `leave` behind what it is doing."""
        self._root = _Lane(root, self._on_error)

    def wait(self, count: int) -> None:
        """Until at most `count` calls of each are under way or wait."""
        for lane in self._all():
            lane.wait(count)

    def errors(self) -> dict[str, EngineError | ValueError]:
        """By receiver name. Once the context has been left."""
        errors = {lane.name: lane.error for lane in self._lanes if lane.error is not None}
        if self._given_up:  # an exception of the trainer's does not come here
            cause = "; ".join(str(lane.error) for lane in self._all() if lane.error is not None)
            for lane in self._lanes:
                errors.setdefault(lane.name, EngineError(f"{lane.name}: its push was given up with another's: {cause}"))
        return errors

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, _kind: object, exception: BaseException | None, _traceback: object) -> None:
        why = None
        if exception is not None:
            why = str(exception)
            self._give_up()
        for lane in self._all():
            lane.wait(0)
        if self._given_up:
            for lane in self._lanes:
                lane.abandon(why or "another engine failed")
        for lane in self._all():
            lane.close()

    def _all(self) -> list[_Lane]:
        return self._lanes if self._root is None else [*self._lanes, self._root]

    def _submit(self, lane: _Lane, method: str, arguments: tuple[Any, ...]) -> None:
        lane.run(lambda: None if self._given_up else lane.call(method, arguments))

    def _on_error(self) -> None:
        """In the thread of the one that failed."""
        if self._root is not None:
            self._give_up()

    def _give_up(self) -> None:
        """What has not been called yet never is."""
        if not self._given_up and self._root is not None:
            self._root.receiver.stop()
            self._root.run(self._root.receiver.leave)  # in its own thread: not under a broadcast
        self._given_up = True


class _Lane:
    """Calls to one receiver, in order, in a thread of their own; after the first error the rest are skipped."""

    def __init__(self, receiver: Any, on_error: Callable[[], None]) -> None:
        self.receiver, self.name, self.error = receiver, receiver.name, None
        self._on_error: Callable[[], None] | None = on_error
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="keju-push")
        self._tasks: list[Future] = []

    def run(self, task: Callable[[], object]) -> None:
        self._tasks.append(self._pool.submit(task))

    def call(self, method: str, arguments: tuple[Any, ...]) -> None:
        if self.error is not None:
            return
        try:
            getattr(self.receiver, method)(*arguments)
        except (EngineError, ValueError) as error:
            self.error = error
        except Exception as error:  # whatever it is, the engine's weights are of no known version now
            self.error = EngineError(f"{self.name}: {method}: {type(error).__name__}: {error}")
            self.error.__cause__ = error
        if self.error is not None:
            self._on_error()

    def abandon(self, why: str) -> None:
        """The engine refuses, as it should, and is ready for another push; no error of this one's."""
        if self.error is None:
            self.run(lambda: self._abandon(why))

    def wait(self, count: int) -> None:
        while len(self._tasks) > count:
            self._tasks.pop(0).result()

    def close(self) -> None:
        self.wait(0)
        self._pool.shutdown()
        self._on_error = None  # or receivers would live until a collection of cycles

    def _abandon(self, why: str) -> None:
        with contextlib.suppress(EngineError, ValueError):
            self.receiver.chunk({"abandon": why})


def _written(places: Sequence[Place], tensors: Iterator[tuple[str, Tensor]], buffer: Buffer) -> dict[str, Any]:
    """The chunk, as it is told."""
    entries = [write(_next(tensors, place.meta), place, buffer) for place in places]
    buffer.flush()
    return {"buffer": buffer.address(places[-1].end), "tensors": entries}


def _next(tensors: Iterator[tuple[str, Tensor]], meta: TensorMeta) -> Tensor:
    """The next tensor, which must be the one announced. Raises ValueError."""
    name, tensor = next(tensors, ("nothing", None))
    if name != meta.name or tuple(tensor.shape) != meta.shape:
        came = name if tensor is None else f"{name} {tuple(tensor.shape)}"
        raise ValueError(f"weights: {came} came where {meta.name} {meta.shape} was announced")
    return tensor
