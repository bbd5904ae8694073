"""How worker processes are started: spawned, and without importing the program's main module again.

multiprocessing tells a spawned process to import whatever `sys.modules["__main__"]` came from. For a trainer that is torch, and
seconds, in each worker and each replacement; here the process that starts one shows an empty module instead, while it writes
down what to import. This file is imported by each worker, so it imports nothing else.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any

_SPAWNING = threading.Lock()


class MainlessProcess(SpawnProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        with _SPAWNING, _empty_main():
            return SpawnProcess._Popen(process)


class MainlessSpawn(SpawnContext):
    """The spawn context, whose processes know nothing of `__main__`: what is defined there cannot be sent to them."""

    Process = MainlessProcess


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
