"""The transaction around a push, over ranks that are threads: agreed on, proved, repeated once, or every rank raises."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rollout.engine import Decoding, EngineError, Request
from rollout.ranks import Ranks
from rollout.types import Sample
from rollout.weights.source import TensorMeta
from rollout.weights.sync import Probe, WeightSync, _Watched

NAMES = ["model.embed_tokens.weight", "model.layers.0.q.weight", "model.norm.weight"]
PROBE = Probe(np.arange(5, dtype=np.int32), bound=0.01, new_tokens=4)


class Source:
    """What each rank of a sharded policy offers: every tensor is made whole by a collective of all ranks."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.passes = 0

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, torch.float32, (3,)) for name in NAMES]

    def __iter__(self):
        for name in NAMES:
            yield name, self._whole()
        self.passes += 1

    def _whole(self) -> torch.Tensor:
        tensor = torch.ones(3)
        if self._group is not None:
            self._group.allreduce([tensor]).wait()
        return tensor


class Engine:
    """told: what goes wrong, one entry an attempt ("ready", "load", "name", "generate", an offset in nats), None for nothing."""

    def __init__(self, rank: int, told: Sequence[Any]) -> None:
        self._rank, self._told = rank, list(told)
        self.calls: list[str] = []
        self.restart_fails = False
        self.version: int | None = None
        self._now: Any = None

    def ready(self) -> None:
        self.calls.append("ready")
        self._now = self._told.pop(0) if self._told else None
        if self._now == "ready":
            raise EngineError(f"rank {self._rank}'s engine: no answer to start")

    def load(self, version: int, source: Any) -> None:
        self.calls.append(f"load {version}")
        self.version = None
        assert [name for name, _ in source] == NAMES
        if self._now == "load":
            raise EngineError(f"rank {self._rank}'s engine: chunk refused")
        if self._now == "name":
            raise ValueError(f"rank {self._rank}'s engine: weight 'x' is not one of the engine's")
        self.version = version

    def submit(self, requests: Sequence[Request], decoding: Decoding, progress: Any = None) -> Any:
        self.calls.append("submit")
        assert [len(request.prompt_token_ids) for request in requests] == [5, 5]
        if self._now == "generate":
            raise EngineError(f"rank {self._rank}'s engine: its process ended (signal 9) during generate")
        return Generation(requests, decoding, self._now if isinstance(self._now, float) else 0.0)

    def restart(self) -> None:
        self.calls.append("restart")
        if self.restart_fails:
            raise EngineError(f"rank {self._rank}'s engine: no answer to start within 1 s")


class Generation:
    def __init__(self, requests: Sequence[Request], decoding: Decoding, off: float) -> None:
        self.done = False
        self._count, self._tokens, self._off = len(requests), decoding.max_new_tokens, off

    def poll(self, seconds: float) -> list[tuple[int, Sample]]:
        self.done = True
        logprobs = np.full(self._tokens, -1.0, np.float32)
        logprobs[-1] += self._off  # one token of the second output alone
        plain = np.full(self._tokens, -1.0, np.float32)
        tokens = np.zeros(self._tokens, np.int32)
        return [(place, Sample(tokens, logprobs if place == 1 else plain, "length", 1)) for place in range(self._count)]


class Rank:
    """What one rank did."""

    def __init__(self, rank: int, ranks: Ranks, told: Sequence[Any]) -> None:
        self.engine, self.notes, self.scored, self.error = Engine(rank, told), [], 0, None
        self.source = Source(ranks.group)
        self.advanced = 0
        self.sync = WeightSync(
            self.engine, self.source, ranks, score=self._score, probe=PROBE, seconds=20.0, note=self.notes.append
        )
        self._group = ranks.group

    def _score(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A collective, as the policy's forward pass is."""
        assert len(prompts) == len(responses) == 2
        if self._group is not None:
            self._group.allreduce([torch.ones(1)]).wait()
        self.scored += 1
        return [np.full(len(response), -1.0, np.float32) for response in responses]

    def advance(self, _count: int) -> None:
        self.advanced += 1


def over_ranks(*told: Sequence[Any], act: Callable[[Rank], None] | None = None, before: Any = None) -> list[Rank]:
    """One rank a thread, gloo between them; each pushes version 3, or does `act`. What they raise is in `error`."""
    size, store = len(told), dist.HashStore()
    states: list[Rank | None] = [None] * size

    def run(rank: int) -> None:
        backend = dist.distributed_c10d.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))
        state = states[rank] = Rank(rank, ThreadRanks(rank, size, backend), told[rank])
        if before is not None:
            before(state, rank)
        try:
            if act is None:
                state.sync.push(3, state.advance)
            else:
                act(state)
        except Exception as error:
            state.error = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank hangs"
    return states


class ThreadRanks(Ranks):
    """`Ranks` over a backend of this thread's own: torch's object collectives want a process each."""

    def all_gather(self, value: Any) -> list[Any]:
        data = torch.zeros(1024, dtype=torch.uint8)
        encoded = json.dumps(value).encode()
        data[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        gathered = [torch.zeros_like(data) for _ in range(self.size)]
        self.group.allgather([gathered], [data]).wait()
        return [json.loads(bytes(one.tolist()).rstrip(b"\0")) for one in gathered]


ATTEMPT = ["ready", "load 3", "submit"]


def test_a_push_that_goes_well():
    ranks = over_ranks([], [])
    for rank in ranks:
        assert rank.error is None
        assert rank.engine.calls == ATTEMPT
        assert rank.engine.version == rank.sync.version == 3
        assert (rank.sync.repeats, rank.notes, rank.source.passes, rank.scored, rank.advanced) == (0, [], 1, 1, 3)
        assert rank.sync.measured() == {"sync/probe": 0.0, "sync/repeats": 0}


@pytest.mark.parametrize(
    ("what", "first", "scored"),
    [
        ("ready", ["ready"], 1),
        ("load", ["ready", "load 3"], 1),
        ("name", ["ready", "load 3"], 1),
        ("generate", ATTEMPT, 2),
        (0.011, ATTEMPT, 2),
        (-0.5, ATTEMPT, 2),
        (float("nan"), ATTEMPT, 2),
        (float("-inf"), ATTEMPT, 2),
    ],
)
def test_a_failure_on_one_rank_is_repeated_once_for_all(what, first, scored):
    ranks = over_ranks([], [what], [])
    for number, rank in enumerate(ranks):
        assert rank.error is None
        assert rank.engine.calls == [*first, *(["restart"] if number == 1 else []), *ATTEMPT]
        assert rank.engine.version == 3
        assert (rank.sync.repeats, rank.scored) == (1, scored)
        (note,) = rank.notes
        assert note.startswith("weights, version 3: rank 1")
        assert note.endswith("; started anew, pushed again")


@pytest.mark.parametrize("second", ["ready", "load", "generate", 0.4])
def test_a_second_failure_raises_on_every_rank(second):
    ranks = over_ranks([None, second], ["load", None], [])
    for rank in ranks:
        assert isinstance(rank.error, EngineError)
        assert str(rank.error).startswith("weights, version 3: pushed twice without success: rank 0")
    assert ranks[0].engine.calls.count("restart") == 0
    assert ranks[1].engine.calls.count("restart") == 1


def test_every_failed_rank_is_named_and_restarted():
    ranks = over_ranks(["load"], [], ["name"])
    for rank in ranks:
        assert "rank 0's engine: chunk refused; rank 2's engine: weight 'x'" in rank.notes[0]
    assert [rank.engine.calls.count("restart") for rank in ranks] == [1, 0, 1]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_an_engine_finds_free_what_the_policy_does_not_use(monkeypatch, on_gpu):
    order = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("given back"))

    class Restarted(Engine):
        def restart(self):
            order.append("restart")
            super().restart()

    WeightSync(Restarted(0, ["load"]), Source(None), Ranks()).push(5)
    assert order == (["given back", "restart"] if on_gpu else ["restart"])


def test_a_restart_that_fails_raises_on_every_rank():
    def before(rank: Rank, number: int) -> None:
        rank.engine.restart_fails = number == 1

    ranks = over_ranks([], ["load"], [], before=before)
    for rank in ranks:
        assert isinstance(rank.error, EngineError)
        assert str(rank.error) == "an engine does not start again: rank 1's engine: no answer to start within 1 s"


@pytest.mark.parametrize(("off", "passes"), [(0.0099, True), (0.0101, False), (float("nan"), False), (float("inf"), False)])
def test_the_probes_bound(off, passes):
    (rank,) = over_ranks([off, off])
    assert (rank.error is None) == passes
    assert rank.sync.worst == pytest.approx(abs(off), rel=1e-3, nan_ok=True)
    if not passes:
        assert "rank 0: probe: the engine's log-probabilities are off the policy's by" in str(rank.error)
        assert "above 0.01" in str(rank.error)


def test_without_a_probe_nothing_is_sampled():
    engine = Engine(0, [])
    WeightSync(engine, Source(None), Ranks()).push(5)
    assert engine.calls == ["ready", "load 5"]
    assert engine.version == 5


def test_recover_restarts_the_lost_and_pushes_the_version_of_now_to_all():
    def act(rank: Rank) -> None:
        rank.sync.push(7)
        rank.sync.recover([None, "rank 1's engine: its process ended (signal 9)"])

    ranks = over_ranks([], [], act=act)
    for number, rank in enumerate(ranks):
        assert rank.error is None
        once = ["ready", "load 7", "submit"]
        assert rank.engine.calls == [*once, *(["restart"] if number == 1 else []), *once]
        assert rank.sync.repeats == 1
        assert rank.notes == ["rank 1's engine: its process ended (signal 9); started anew, weights of version 7 pushed again"]


def test_an_unexpected_exception_is_not_swallowed():
    engine = Engine(0, [])
    engine.load = lambda version, source: {}["a mistake"]
    with pytest.raises(KeyError):
        WeightSync(engine, Source(None), Ranks()).push(5)


def test_the_deadline_is_told_of_every_tensor_and_one_is_whole_at_a_time():
    told, alive = [], []

    class Deadline:
        def at(self, where: str) -> None:
            told.append(where)
            if where.startswith("gathering"):
                assert all(reference() is None for reference in alive)

    watched = _Watched(Source(None), Deadline(), lambda count: told.append(count))
    iterator = iter(watched)
    while (item := next(iterator, None)) is not None:
        alive.append(weakref.ref(item[1]))
        del item
    assert told == [
        "gathering model.embed_tokens.weight", "sending model.embed_tokens.weight", 1,
        "gathering model.layers.0.q.weight", "sending model.layers.0.q.weight", 1,
        "gathering model.norm.weight", "sending model.norm.weight", 1,
        "after the last tensor",
    ]  # fmt: skip


def test_a_probe_is_the_same_on_every_rank_and_in_every_run():
    first, second = Probe.of(1000, 160, 0.5), Probe.of(1000, 160, 0.5)
    assert np.array_equal(first.prompt, second.prompt)
    assert first.prompt.dtype == np.int32
    assert len(first.prompt) == 160
    assert first.prompt.min() >= 0
    assert first.prompt.max() < 1000
