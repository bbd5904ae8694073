"""Weights by broadcast, gloo over loopback: real processes that receive, refuse, hang and die in the middle of it."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_weights_push import Source
from torch.distributed import distributed_c10d

from rollout.engine import EngineError
from rollout.weights.broadcast import Broadcast, Meeting, _backend
from rollout.weights.push import Sender

pytestmark = pytest.mark.timeout(180)
SECONDS = 6.0
"""Deadline of a meeting and of a broadcast."""
CHUNKS = len(Source().weights) - 6  # six layers of two


def work(connection: Any, worker: int) -> None:
    """A worker of an engine: a process with an inbox. told: {"die" | "hang" | "damage": number of the chunk}."""
    from rollout.weights.inbox import Inbox
    from rollout.weights.wire import check, read

    torch.set_num_threads(1)
    inbox, told, loaded, number = Inbox(torch.device("cpu")), {}, {}, 0

    def chunk(message: dict[str, Any]) -> None:
        nonlocal number
        if "abandon" in message:
            raise ValueError("given up")
        if told.get("die") == number:
            os._exit(7)
        if told.get("hang") == number:
            time.sleep(60)
        buffer = inbox.receive(message["buffer"])
        if told.get("damage") == number:
            buffer[3] ^= 1
        for entry in message["tensors"]:
            check(entry, buffer)
            loaded[entry["name"]] = read(entry, buffer, torch.bfloat16).clone()
        number += 1

    def begin() -> None:
        nonlocal number
        loaded.clear()
        number = 0

    connection.send("ready")
    with suppress(EOFError, ConnectionError):
        while True:
            method, argument = connection.recv()
            try:
                if method == "told":
                    told = argument
                elif method == "connect":
                    inbox.connect(Meeting(**argument), worker)
                elif method in ("begin", "chunk"):
                    begin() if method == "begin" else chunk(argument)
                connection.send((None, loaded if method == "loaded" else None))
            except Exception as error:
                if isinstance(error, ConnectionError):
                    raise
                inbox.leave()
                connection.send((f"{type(error).__name__}: {error}", None))


class Receiver:
    """An engine of several workers, each a process, as `rollout.weights.push.Receiver`."""

    def __init__(self, name: str, workers: int = 1) -> None:
        self.name, self.workers = name, workers
        self.connects, self.version = 0, None
        self.start()

    def start(self) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for worker in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, worker), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            assert pipe.poll(120), "on a busy machine importing torch takes a while"
            pipe.recv()

    @property
    def identity(self) -> tuple[str, int]:
        return self.name, self._processes[0].pid

    def ask(self, method: str, argument: Any = None) -> list[Any]:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send((method, argument))
        answers = []
        for pipe in self._pipes:
            try:
                if not pipe.poll(4 * SECONDS):
                    raise EngineError(f"{self.name}: no answer to {method}")
                answers.append(pipe.recv())
            except (EOFError, OSError):
                answers.append(("its process ended", None))
        for why, _ in answers:
            if why is not None:
                raise EngineError(f"{self.name}: {method} refused: {why}")
        return [value for _, value in answers]

    def begin(self, version: int, manifest: Any) -> None:
        self.version = None
        self.ask("begin")

    def connect(self, info: dict[str, Any]) -> None:
        self.connects += 1
        self.ask("connect", info)

    def chunk(self, chunk: dict[str, Any]) -> None:
        self.ask("chunk", chunk)

    def commit(self, version: int) -> None:
        self.version = version

    def is_whole(self, source: Source) -> bool:
        return all(
            list(loaded) == list(source.weights)
            and all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in source.weights.items())
            for loaded in self.ask("loaded")
        )

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            process.kill()
            process.join()
            process.close()
            pipe.close()

    def restart(self) -> None:
        self.close()
        self.start()


@pytest.fixture(scope="module")
def two() -> Iterator[list[Receiver]]:
    """One engine of two workers and one of one: with the trainer, four ranks."""
    receivers = [Receiver("engine 0", workers=2), Receiver("engine 1")]
    for receiver in receivers:
        receiver.ask("told", {})
    yield receivers
    for receiver in receivers:
        receiver.close()


@pytest.fixture
def sender(two) -> Iterator[Sender]:
    for receiver in two:
        receiver.ask("told", {})
        receiver.connects = 0
    sender = Sender(torch.bfloat16, "engine", 1, Broadcast("127.0.0.1", torch.device("cpu"), SECONDS))
    yield sender
    sender.close()


def sends(sender: Sender, version: int, receivers: list[Receiver]) -> None:
    source = Source(seed=version)
    assert sender.send(version, source, receivers) == {}
    assert source.finished
    assert all(receiver.is_whole(source) and receiver.version == version for receiver in receivers)


def fails(sender: Sender, receivers: list[Receiver]) -> dict[str, Any]:
    """The errors of a push that nobody may take for done."""
    source = Source()
    start = time.monotonic()
    errors = sender.send(9, source, receivers)
    assert time.monotonic() - start < 3 * SECONDS
    assert source.finished
    assert sorted(errors) == sorted(receiver.name for receiver in receivers)
    assert all(receiver.version is None for receiver in receivers)
    return errors


def test_every_worker_of_every_engine_gets_everything_over_one_group(sender, two):
    for version in (1, 2, 3):
        sends(sender, version, two)
    assert [receiver.connects for receiver in two] == [1, 1]
    assert not dist.is_initialized()


def test_another_set_of_engines_is_another_group(sender, two):
    sends(sender, 1, two)
    sends(sender, 2, two[:1])
    sends(sender, 3, two[::-1])
    sends(sender, 4, two[::-1])
    assert [receiver.connects for receiver in two] == [3, 2]


def test_the_default_group_is_left_alone(sender, two):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sends(sender, 1, two)
        sender.close()
        dist.all_reduce(torch.ones(3))
    finally:
        dist.destroy_process_group()
    sends(sender, 2, two)


@pytest.mark.parametrize("chunk", [0, 3, CHUNKS - 1])
def test_one_that_dies_is_named_and_hangs_nobody(sender, two, chunk):
    sends(sender, 1, two)
    two[1].ask("told", {"die": chunk})
    start = time.monotonic()
    errors = fails(sender, two)
    assert time.monotonic() - start < SECONDS, "its sockets close, so nobody waits for the deadline"
    assert str(errors["engine 1"]) == "engine 1: chunk refused: its process ended"
    assert "engine 0: " in str(errors["engine 0"])
    two[1].restart()
    sends(sender, 2, two)
    assert two[0].connects == 2


def test_one_that_died_between_pushes_is_met_anew(sender, two):
    sends(sender, 1, two)
    two[0].restart()
    sends(sender, 2, two)
    assert [receiver.connects for receiver in two] == [2, 2]


def test_one_that_is_gone_already_is_not_waited_for(sender, two):
    two[1]._processes[0].kill()
    two[1]._processes[0].join()
    start = time.monotonic()
    errors = sender.send(1, Source(), two)
    assert time.monotonic() - start < SECONDS / 2
    assert "its process ended" in str(errors["engine 1"])
    two[1].restart()
    sends(sender, 2, two)


def test_one_that_hangs_is_named_at_the_deadline(sender, two):
    sends(sender, 1, two)
    two[1].ask("told", {"hang": 3})
    two[1].ask = lambda method, argument=None, ask=two[1].ask: _impatient(two[1], ask, method, argument)
    try:
        errors = fails(sender, two)
    finally:
        del two[1].ask
    assert str(errors["engine 1"]) == "engine 1: no answer to chunk"
    two[1].restart()
    sends(sender, 2, two)


def _impatient(receiver: Receiver, ask: Any, method: str, argument: Any) -> list[Any]:
    if method != "chunk":
        return ask(method, argument)
    receiver._pipes[0].send((method, argument))
    if not receiver._pipes[0].poll(SECONDS / 2):
        raise EngineError(f"{receiver.name}: no answer to {method}")
    receiver._pipes[0].recv()
    return []


@pytest.mark.parametrize("worker", [0, 1])
def test_one_worker_that_sees_damage_refuses_for_all(sender, two, worker):
    """And nobody must be started anew for the next push to succeed. (Engine 1 may learn it at the deadline only: its bytes come
    by way of engine 0's other worker, which has done nothing wrong and knows of nothing.)"""
    two[0]._pipes[worker].send(("told", {"damage": 2}))
    two[0]._pipes[worker].recv()
    errors = fails(sender, two)
    assert "engine 0: chunk refused: ValueError: model.layers.1.q.weight" in str(errors["engine 0"])
    assert "engine 1: " in str(errors["engine 1"])
    two[0].ask("told", {})
    sends(sender, 2, two)


def test_one_that_does_not_come_to_the_meeting(sender, two):
    connect, two[1].connect = two[1].connect, lambda info: time.sleep(1.5 * SECONDS)
    try:
        errors = fails(sender, two)
    finally:
        two[1].connect = connect
    assert "did not meet the other 3 at 127.0.0.1:" in str(errors["engine 0"])
    assert "(not all have come)" in str(errors), "whoever's deadline it was; the others heard of it"
    sends(sender, 2, two)


def test_one_that_dies_in_the_meeting_hangs_nobody(sender, two):
    def die(info):
        time.sleep(0.2)  # the others wait for it already
        raise EngineError("engine 1: its process ended")

    connect, two[1].connect = two[1].connect, die
    start = time.monotonic()
    try:
        errors = fails(sender, two)
    finally:
        two[1].connect = connect
    assert time.monotonic() - start < SECONDS / 2
    assert str(errors["engine 1"]) == "engine 1: its process ended"
    sends(sender, 2, two)


def test_a_source_that_breaks_its_word_ends_the_push_for_all(sender, two):
    sends(sender, 1, two)
    source = Source(damage={"model.layers.2.q.weight": []})
    with pytest.raises(ValueError, match="came where"):
        sender.send(2, source, two)
    assert source.finished
    sends(sender, 3, two)


def test_nothing_is_left_behind(two):
    def push(version: int) -> None:
        sender = Sender(torch.bfloat16, "engine", 1, Broadcast("127.0.0.1", torch.device("cpu"), SECONDS))
        sends(sender, version, two)
        sender.close()

    push(1)  # gloo keeps a thread and its descriptors from the first group on
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for version in range(2, 6):
        push(version)
    gc.collect()
    assert (threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))) == before


def test_nobody_can_be_met_at_an_address_that_is_not_ours(two):
    sender = Sender(torch.bfloat16, "engine", 1, Broadcast("keju.invalid", torch.device("cpu"), 1.0))
    with pytest.raises(EngineError, match=r"nobody can be met at 'keju\.invalid'"):
        sender.send(1, Source(), two)


def test_a_meeting_is_checked_where_it_comes_in():
    with pytest.raises(ValueError, match="backend: 'mpi' is none of gloo, nccl"):
        Meeting("localhost", 1, 1, 2, "mpi", 1.0)
    with pytest.raises(ValueError, match="rank_offset: 2 is not below world_size 2"):
        Meeting("localhost", 1, 2, 2, "gloo", 1.0)


@pytest.mark.parametrize("before", [None, "1"])
def test_a_group_over_nccl_does_not_end_the_process_where_a_member_is_gone(monkeypatch, before):
    """torch reads the variable while the group is made; torchrun has set it to 1."""
    seen = []

    class Nccl:
        def __init__(self, *arguments):
            seen.append(os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"])

        Options = SimpleNamespace

    monkeypatch.setattr(distributed_c10d, "ProcessGroupNCCL", Nccl, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", before)
    _backend(Meeting("localhost", 1, 0, 2, "nccl", 1.0), None, 0, torch.device("cuda", 0), timedelta(seconds=1))
    assert seen == ["0"]
    assert os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == before
