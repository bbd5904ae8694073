"""Weights to engines on any host: each chunk's bytes are broadcast over a process group of their own, the trainer being rank 0
and the engines' workers ranks 1 … n. NCCL between GPUs (not run on one yet), gloo between CPUs.

The group is made from a store and torch's backend class alone: it is no part of `torch.distributed`'s registry, so neither the
trainer's groups nor vLLM's know of it, and it may come and go while they stay. It is made at the first push, and anew where the
engines are others than last time or one of them failed. Every meeting and every broadcast has a deadline. All stand or fall
together: the first that fails ends the push for all, and the trainer leaves, which the others notice at once over gloo and at
their deadline at the latest over NCCL.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions, ProcessGroupGloo

from rollout.errors import EngineError

Backend = Literal["gloo", "nccl"]
POLL_SECONDS = 1e-3
OVER = "over"
"""The store's key that says that nobody need wait any more."""
NCCL_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
UNHURRIED = timedelta(days=1)
"""NCCL's own timeout, whose end would be the process's; ours comes first."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a group meets, as JSON has it (`asdict`): what `rollout.weights.push.Receiver.connect` passes to an engine.

    rank_offset: rank of the engine's first worker; its others follow. seconds: deadline of the meeting and of each broadcast.
    """

    host: str
    port: int
    rank_offset: int
    world_size: int
    backend: Backend
    seconds: float

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend: {self.backend!r} is none of {', '.join(get_args(Backend))}")
        if not 0 <= self.rank_offset < self.world_size:
            raise ValueError(f"rank_offset: {self.rank_offset} is not below world_size {self.world_size}")


class Group:
    """One member of a group. Constructing it waits until all are there.

    rank: in the group. store: rank 0's own, the one that the others find at host and port; None for those. stopped: whether
    waiting is in vain. Raises EngineError where they are not all there in time, or a broadcast fails or is late; a group in which
    one failed is over.
    """

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        device: torch.device,
        store: TCPStore | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._meeting, self._rank, self._device, self._stopped = meeting, rank, device, stopped
        self._store, self._backend = store, None
        deadline = timedelta(seconds=meeting.seconds)
        try:
            self._store = store or TCPStore(meeting.host, meeting.port, timeout=deadline, wait_for_workers=False)
            self._wait_for_all()
            self._backend = _backend(meeting, PrefixStore("keju-weights", self._store), rank, device, deadline)
            self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))  # NCCL meets at the first collective
        except (RuntimeError, ValueError) as error:
            self.close()
            raise EngineError(
                f"weights: rank {rank} did not meet the other {meeting.world_size - 1} at {meeting.host}:{meeting.port} within "
                f"{meeting.seconds:g} s ({_first_line(error)})"
            ) from None

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's bytes into all others' (contiguous, on the group's device); waits until this member's part is done. Raises
        EngineError."""
        if self._backend is None:
            raise EngineError(f"weights: rank {self._rank} has left the broadcast's group")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self._meeting.seconds)
        try:
            work = self._backend.broadcast([tensor], options)
            if self._meeting.backend == "nccl":
                self._wait_for_device(work)
            else:
                work.wait(options.timeout)
        except RuntimeError as error:
            self.close()
            raise EngineError(f"weights: broadcast, rank {self._rank}: {_first_line(error)}") from None

    def close(self) -> None:
        """Leaves; those who wait for this member learn it as soon as the backend can tell them."""
        if self._rank == 0 and self._store is not None:
            self._store.set(OVER, "")  # for those who still wait in the meeting
        backend, self._backend, self._store = self._backend, None, None
        if backend is not None and self._meeting.backend == "nccl":
            backend.abort()  # not shutdown(), which would wait for a broadcast that nobody takes part in any more

    def _wait_for_all(self) -> None:
        """Until all have come: what follows, NCCL's above all, has no end of its own where one does not."""
        self._store.add("here", 1)
        self._poll(lambda: self._store.add("here", 0) == self._meeting.world_size, "not all have come")

    def _poll(self, done: Callable[[], bool], what: str) -> None:
        """Raises RuntimeError."""
        end = time.monotonic() + self._meeting.seconds
        while not done():
            if self._stopped() or self._store.check([OVER]):
                raise RuntimeError("another failed")
            if time.monotonic() > end:
                raise RuntimeError(what)
            time.sleep(POLL_SECONDS)

    def _wait_for_device(self, work: Any) -> None:
        """Polls: NCCL's own wait only makes the stream wait, and has no end where a member is gone."""
        self._poll(work.is_completed, "not done in time")
        work.wait()  # raises what went wrong; and the stream that reads the bytes comes behind NCCL's
        torch.cuda.current_stream(self._device).synchronize()


def _backend(meeting: Meeting, store: PrefixStore, rank: int, device: torch.device, deadline: timedelta) -> Any:
    if meeting.backend == "gloo":
        return ProcessGroupGloo(store, rank, meeting.world_size, deadline)
    from torch.distributed.distributed_c10d import ProcessGroupNCCL  # absent where torch was built without it

    torch.cuda.set_device(device)  # of this thread
    options = ProcessGroupNCCL.Options()
    options._timeout = UNHURRIED
    with _errors_left_to_us():
        return ProcessGroupNCCL(store, rank, meeting.world_size, options)


@contextlib.contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """torch's watchdog ends the process where NCCL reports an error, as of a member that is gone, unless a group is made under
    this setting (torchrun sets another)."""
    before = os.environ.get(NCCL_ERRORS)
    os.environ[NCCL_ERRORS] = "0"
    try:
        yield
    finally:
        os.environ.pop(NCCL_ERRORS) if before is None else os.environ.update({NCCL_ERRORS: before})


class BroadcastBuffer:
    """Plain memory of the trainer's. number: its own among the transport's."""

    def __init__(self, nbytes: int, device: torch.device, number: int) -> None:
        self.nbytes, self._number = nbytes, number
        try:
            self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # no memory, on a GPU or not
            what = f"{nbytes >> 20} MiB on {device} for a transfer buffer"
            raise EngineError(f"weights: no {what} ({_first_line(error)})") from None

    def address(self, used: int) -> dict[str, Any]:
        """What a chunk says of its buffer: only the bytes in use are sent."""
        return {"broadcast": self._number, "bytes": used}

    def flush(self) -> None:
        """Waits for the stream that wrote: the broadcast runs on another."""
        if self.bytes.is_cuda:
            torch.cuda.current_stream(self.bytes.device).synchronize()

    def close(self) -> None:
        self.bytes = self.bytes.new_empty(0)


class Broadcast:
    """`rollout.weights.transport.Transport`. host: under which the engines' hosts reach this one. device: where the trainer's
    buffers lie, which says the backend. seconds: deadline of each meeting and of each broadcast."""

    def __init__(self, host: str, device: torch.device, seconds: float = 300.0) -> None:
        self._host, self._device, self._seconds = host, device, seconds
        self._buffers: list[BroadcastBuffer] = []
        self._root: _Root | None = None
        self._members: list[Hashable] = []

    def buffer(self, nbytes: int) -> BroadcastBuffer:
        self._buffers.append(BroadcastBuffer(nbytes, self._device, len(self._buffers)))
        return self._buffers[-1]

    def meet(self, lanes: Any) -> None:
        """Takes the trainer's own end into the push as one more receiver, which broadcasts what the others receive."""
        lanes.wait(0)  # who is gone already is not waited for in a meeting
        if lanes.failed:
            return
        members = [receiver.identity for receiver in lanes.receivers]
        anew = self._root is None or self._root.over or members != self._members
        if anew:
            self.close()
            self._root, self._members = _Root(self._buffers), members
        lanes.stand_together(self._root)
        if anew:
            self._invite(lanes)

    def close(self) -> None:
        """Leaves the group."""
        if self._root is not None:
            self._root.leave()
        self._root, self._members = None, []

    def _invite(self, lanes: Any) -> None:
        deadline = timedelta(seconds=self._seconds)
        try:
            store = TCPStore(self._host, 0, is_master=True, timeout=deadline, wait_for_workers=False)
        except RuntimeError as error:
            raise EngineError(f"weights: nobody can be met at {self._host!r} ({_first_line(error)})") from None
        size = 1 + sum(receiver.workers for receiver in lanes.receivers)
        backend: Backend = "nccl" if self._device.type == "cuda" else "gloo"
        meetings, offset = [], 1
        for receiver in lanes.receivers:
            meetings.append(Meeting(self._host, store.port, offset, size, backend, self._seconds))
            offset += receiver.workers
        own = Meeting(self._host, store.port, 0, size, backend, self._seconds)
        lanes.connect([asdict(meeting) for meeting in meetings], (own, self._device, store))


class _Root:
    """The trainer's own end of a broadcast, as one more `rollout.weights.push.Receiver`: its calls run beside the others'."""

    name = "the trainer's broadcast"

    def __init__(self, buffers: list[BroadcastBuffer]) -> None:
        self._buffers = buffers
        self._group: Group | None = None
        self.over = False

    def connect(self, invitation: tuple[Meeting, torch.device, TCPStore]) -> None:
        meeting, device, store = invitation
        self._group = Group(meeting, 0, device, store, lambda: self.over)

    def chunk(self, chunk: dict[str, Any]) -> None:
        sent = chunk["buffer"]
        self._group.broadcast(self._buffers[sent["broadcast"]].bytes[: sent["bytes"]])

    def commit(self, version: int) -> None: ...

    def stop(self) -> None:
        """From any thread: nothing more is worth waiting for."""
        self.over = True

    def leave(self) -> None:
        self.stop()
        if self._group is not None:
            self._group.close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
