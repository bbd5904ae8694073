"""What an earlier start of a job left in torchrun's store is not taken for this start's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from trainer.fresh_store import fresh_store

RANKS = 3


def meet(store: dist.Store, order: list[int]) -> list[bytes]:
    """What each rank finds under the key that rank 0 writes. order: in which they come, each when the one before has begun."""
    together = threading.Barrier(RANKS, timeout=20)

    def rank(number: int, begun: threading.Event) -> bytes:
        begun.set()
        with fresh_store(store.clone(), number, RANKS) as fresh:
            if number == 0:
                assert not fresh.check(["alarm"]), "left by the start before"
                fresh.set("alarm", name)
            together.wait()
            return fresh.get("alarm")

    name = f"of {order}"
    with ThreadPoolExecutor(RANKS) as pool:
        futures = {}
        for number in order:
            begun = threading.Event()
            futures[number] = pool.submit(rank, number, begun)
            begun.wait()
        return [futures[number].result(30) for number in range(RANKS)]


def test_every_start_has_a_part_of_its_own_whoever_comes_first():
    store = dist.HashStore()
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        assert meet(store, order) == [f"of {order}".encode()] * RANKS


def test_one_rank_alone_waits_for_nobody():
    before = threading.active_count()
    with fresh_store(dist.HashStore(), 0, 1) as store:
        store.set("a", "b")
        assert store.get("a") == b"b"
    assert threading.active_count() == before
