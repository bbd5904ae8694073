"""A push to receivers that are slow, refuse, or die: in order, complete, over two buffers only, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import rollout.weights.push as push
from rollout.engine import EngineError
from rollout.weights.inbox import Inbox
from rollout.weights.push import Sender
from rollout.weights.source import TensorMeta
from rollout.weights.wire import check, read

LAYERS = 6


class Source:
    """A model of LAYERS layers; counts what is taken of it. damage: what is yielded in place of (name, tensor)."""

    def __init__(self, seed: int = 0, damage: dict[str, Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"model.embed_tokens.weight": (50, 16)}
        for layer in range(LAYERS):
            shapes |= {f"model.layers.{layer}.q.weight": (16, 16), f"model.layers.{layer}.q.bias": (16,)}
        shapes["model.norm.weight"] = (16,)
        self.weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.damage, self.taken, self.finished = damage or {}, 0, False

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights.items():
            self.taken += 1
            for item in self.damage.get(name, [(name, tensor)]):
                if isinstance(item, Exception):
                    raise item
                yield item
        self.finished = True


class Receiver:
    """Loads as an engine does: checks what it finds in the buffer, takes its time, and takes it from there once more.

    fails: {"begin": error, 3: error (the fourth chunk), "commit": error}; seconds: for each chunk.
    """

    workers = 1

    def __init__(self, name: str = "an engine", fails: dict[Any, Exception] | None = None, seconds: float = 0.0) -> None:
        self.name, self._fails, self._seconds = name, fails or {}, seconds
        self.calls: list[Any] = []
        self.loaded: dict[str, Tensor] = {}
        self.version: int | None = None
        self.threads: set[int] = set()
        self._inbox = Inbox(torch.device("cpu"))

    @property
    def identity(self) -> str:
        return self.name

    def _called(self, call: Any) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())
        if call in self._fails:
            raise self._fails[call]

    def begin(self, version: int, manifest: list[dict[str, Any]]) -> None:
        self.version = None
        self._called("begin")
        self.manifest = manifest

    def chunk(self, chunk: dict[str, Any]) -> None:
        if "abandon" in chunk:
            self.calls.append("abandon")
            self.abandoned = chunk["abandon"]
            raise EngineError("refused: the trainer gave up")
        number = sum(isinstance(call, int) for call in self.calls)
        buffer = self._inbox.receive(chunk["buffer"])
        before = buffer.clone()
        time.sleep(self._seconds)
        self._called(number)
        assert torch.equal(before, buffer), "the buffer was written before this was answered"
        for entry in chunk["tensors"]:
            check(entry, buffer)
            self.loaded[entry["name"]] = read(entry, buffer, torch.bfloat16).clone()

    def commit(self, version: int) -> None:
        self._called("commit")
        self.version = version


@pytest.fixture
def sender() -> Iterator[Sender]:
    """One chunk a layer: both buffers over and over."""
    sender = Sender(torch.bfloat16, "engine", 1)
    yield sender
    sender.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Neither threads nor descriptors, whatever happened."""
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()  # exceptions with tracebacks hold the test's receivers, which hold the buffers open
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


CHUNKS = LAYERS + 2
ALL = ["begin", *range(CHUNKS), "commit"]


def is_whole(receiver: Receiver, source: Source) -> bool:
    return list(receiver.loaded) == list(source.weights) and all(
        torch.equal(receiver.loaded[name], tensor.bfloat16()) for name, tensor in source.weights.items()
    )


@pytest.mark.parametrize("count", [1, 3])
def test_all_get_everything_in_order(sender, count):
    receivers = [Receiver(f"engine {number}") for number in range(count)]
    for version in (4, 5):
        source = Source(seed=version)
        for receiver in receivers:
            receiver.calls, receiver.loaded = [], {}
        assert sender.send(version, source, receivers) == {}
        for receiver in receivers:
            assert receiver.calls == ALL
            assert receiver.version == version
            assert is_whole(receiver, source)
            assert [entry["name"] for entry in receiver.manifest] == list(source.weights)
        assert source.taken == len(source.weights)


def test_chunks_are_as_large_as_asked_for():
    sender, receiver, source = Sender(torch.bfloat16, "engine", 1 << 20), Receiver(), Source()
    try:
        assert sender.send(1, source, [receiver]) == {}
    finally:
        sender.close()
    assert receiver.calls == ["begin", 0, "commit"]
    assert is_whole(receiver, source)
    assert len(receiver._inbox._open) == 1, "one chunk needs one buffer"


def test_a_slow_receiver_keeps_its_buffer_until_it_has_answered(sender):
    """Beside a fast one; the slow one compares the buffer's content with what it was when the chunk came."""
    source, slow, fast = Source(), Receiver("slow", seconds=0.03), Receiver("fast")
    assert sender.send(1, source, [slow, fast]) == {}
    assert is_whole(slow, source)
    assert is_whole(fast, source)


def test_gathering_goes_on_while_engines_load(sender):
    """At least the chunk behind the one that is being loaded is written meanwhile."""
    source, receiver = Source(), Receiver(seconds=0.2)
    seen = []
    receiver_chunk = receiver.chunk

    def chunk(message):
        receiver_chunk(message)
        seen.append(source.taken)

    receiver.chunk = chunk
    sender.send(1, source, [receiver])
    assert seen[0] >= 3, "the embedding, and the whole first layer beside its loading"


@pytest.mark.parametrize("where", ["begin", 0, 1, 2, CHUNKS - 1, "commit"])
def test_one_that_fails_is_named_and_the_others_get_everything(sender, where):
    source = Source()
    bad, good = Receiver("bad", {where: EngineError(f"bad: {where} refused")}), Receiver("good", seconds=0.01)
    errors = sender.send(2, source, [bad, good])
    assert list(errors) == ["bad"]
    assert str(errors["bad"]) == f"bad: {where} refused"
    assert bad.version is None
    assert bad.calls == ALL[: ALL.index(where) + 1], "nothing more was asked of it"
    assert good.version == 2
    assert is_whole(good, source)
    assert source.finished


def test_where_all_fail_the_source_is_still_iterated_to_its_end(sender, monkeypatch):
    """The other ranks wait in each gather. Nothing more is converted for nobody, though."""
    written = []
    write = push.write
    monkeypatch.setattr(push, "write", lambda *arguments: written.append(1) or write(*arguments))
    source = Source()
    receivers = [Receiver(f"engine {number}", {0: ValueError("no")}) for number in range(2)]
    errors = sender.send(2, source, receivers)
    assert sorted(errors) == ["engine 0", "engine 1"]
    assert source.finished
    assert source.taken == len(source.weights)
    assert len(written) < len(source.weights)


def test_any_other_exception_of_a_receiver_is_an_engine_error_too(sender):
    source = Source()
    error = sender.send(2, source, [Receiver("bad", {1: KeyError("tensors")})])["bad"]
    assert isinstance(error, EngineError)
    assert str(error) == "bad: chunk: KeyError: 'tensors'"
    assert isinstance(error.__cause__, KeyError)


def test_without_receivers_it_only_iterates(sender, monkeypatch):
    monkeypatch.setattr(push, "write", lambda *_: pytest.fail("a checksum for nobody"))
    monkeypatch.setattr(sender._transport, "buffer", lambda _: pytest.fail("a buffer for nobody"))
    source = Source(damage={"model.layers.3.q.bias": [("anything", torch.zeros(1))]})
    assert sender.send(1, source, []) == {}
    assert source.finished


NAME = "model.layers.2.q.weight"
DAMAGES = {
    "another name": ([("other", torch.zeros(16, 16))], r"other \(16, 16\) came where model\.layers\.2\.q\.weight \(16, 16\)"),
    "another shape": ([(NAME, torch.zeros(16, 17))], r"model\.layers\.2\.q\.weight \(16, 17\) came where"),
    "one too few": ([], r"model\.layers\.2\.q\.bias \(16,\) came where model\.layers\.2\.q\.weight"),
    "one too many": ([(NAME, torch.zeros(16, 16)), (NAME, torch.zeros(16, 16))], "came where model.layers.2.q.bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_source_that_does_not_keep_its_word(sender, damage):
    """Raised here, but first the source is iterated to its end, and engines are told to abandon what was begun."""
    items, match = DAMAGES[damage]
    source, receivers = Source(damage={NAME: items}), [Receiver("slow", seconds=0.02), Receiver("fast")]
    with pytest.raises(ValueError, match=match):
        sender.send(3, source, receivers)
    assert source.finished
    for receiver in receivers:
        assert receiver.calls[-1] == "abandon"
        assert "commit" not in receiver.calls
        assert receiver.version is None
        assert "came where" in receiver.abandoned
        receiver.calls, receiver.loaded = [], {}
    assert sender.send(4, Source(), receivers) == {}
    assert all(is_whole(receiver, Source()) and receiver.version == 4 for receiver in receivers)


def test_a_tensor_behind_the_last_and_one_that_never_comes(sender):
    last = "model.norm.weight"
    receiver = Receiver()
    with pytest.raises(ValueError, match=r"weights: extra came behind the last"):
        sender.send(1, Source(damage={last: [(last, torch.zeros(16)), ("extra", torch.zeros(1))]}), [receiver])
    assert receiver.calls[-1] == "abandon"
    with pytest.raises(ValueError, match=r"nothing came where model\.norm\.weight \(16,\) was announced"):
        sender.send(1, Source(damage={last: []}), [receiver])


def test_a_source_that_raises(sender):
    source, receiver = Source(damage={NAME: [RuntimeError("the gather timed out")]}), Receiver(seconds=0.01)
    with pytest.raises(RuntimeError, match="the gather timed out"):
        sender.send(1, source, [receiver])
    assert receiver.calls[-1] == "abandon"


def test_one_that_failed_is_not_asked_to_abandon(sender):
    bad, good = Receiver("bad", {0: EngineError("died")}), Receiver("good")
    with pytest.raises(ValueError, match="came where"):
        sender.send(1, Source(damage={NAME: []}), [bad, good])
    assert bad.calls == ["begin", 0]
    assert good.calls[-1] == "abandon"


def test_one_tensor_at_a_time_is_whole(sender):
    class Counting(Source):
        alive: ClassVar[list[weakref.ref]] = []

        def __iter__(self):
            for name, tensor in self.weights.items():
                assert all(reference() is None for reference in self.alive)
                whole = tensor.clone()  # as a gather makes it
                self.alive.append(weakref.ref(whole))
                item = [(name, whole)]
                del whole
                yield item.pop()

    assert sender.send(1, Counting(), [Receiver()]) == {}
    assert len(Counting.alive) == len(Source().weights)


def test_buffers_are_kept_and_only_grow(sender):
    class Small(Source):
        def __init__(self):
            super().__init__()
            del self.weights["model.embed_tokens.weight"]

    receiver, sizes = Receiver(), []
    for source in (Small(), Small(), Source(), Small()):
        sender.send(1, source, [receiver])
        sizes.append([buffer.path for buffer in sender._buffers] + [buffer.nbytes for buffer in sender._buffers])
        receiver.calls, receiver.loaded = [], {}
    assert sizes[0] == sizes[1]
    assert sizes[1] != sizes[2] == sizes[3]
    assert len(sizes[3]) == 4
    assert len(receiver._inbox._open) == 2, "the engine lets go of buffers that are no more"


def test_no_memory_for_buffers_is_one_line_and_the_source_is_iterated(sender, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    source, receiver = Source(), Receiver()
    with pytest.raises(EngineError, match=r"weights: no 0 MiB of shared memory for a transfer buffer \(.*No space left"):
        sender.send(1, source, [receiver])
    assert source.finished
    assert receiver.calls == []


def test_a_model_without_weights(sender):
    class Empty(Source):
        def __init__(self):
            super().__init__()
            self.weights = {}

    receiver = Receiver()
    assert sender.send(1, Empty(), [receiver]) == {}
    assert receiver.calls == ["begin", "commit"]
