"""A part of the store through which the ranks meet that no earlier start of the same job has written to.

torchrun keeps one store over its restarts, and what the dead ranks left there (addresses, an NCCL id, an alarm) would be taken
for the living ones': a start after a kill then fails or hangs. The restart's number does not tell them apart, because on several
hosts each torchrun counts its own. So each rank asks rank 0, with a word that nobody said before, for the name of this start's
part.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

POLL_SECONDS = 0.05


@contextmanager
def fresh_store(store: dist.Store, rank: int, size: int) -> Iterator[dist.Store]:
    """To be left when all ranks have met. Waits for rank 0, at most the store's timeout; raises what the store raises then."""
    if rank:
        word = secrets.token_hex(8)
        store.set(f"keju/ask/{rank}", word)
        yield dist.PrefixStore(f"keju/{store.get(f'keju/answer/{word}').decode()}", store)
        return
    name, met = secrets.token_hex(8), threading.Event()
    thread = threading.Thread(target=_answer, args=(store.clone(), size, name, met), name="keju-meeting", daemon=True)
    thread.start()
    try:
        yield dist.PrefixStore(f"keju/{name}", store)
    finally:
        met.set()
        thread.join()


def _answer(store: dist.Store, size: int, name: str, met: threading.Event) -> None:
    answered: set[str] = set()
    asking = {rank: f"keju/ask/{rank}" for rank in range(1, size)}
    while asking and not met.wait(POLL_SECONDS):
        for key in asking.values():
            if store.check([key]) and (word := store.get(key).decode()) not in answered:
                store.set(f"keju/answer/{word}", name)
                answered.add(word)
