"""vLLM's executor of several workers (tensor parallel), kept in step where they refuse a call. Runs in vLLM's process; imports
vLLM.

`MultiprocExecutor.collective_rpc` raises at the first worker's failure, and leaves in their queues what the workers behind it
answer. There it stands as their answer to the next call, and theirs to that one as the answer to the one behind it, for good: a
call fails for one long ago, or is believed done before it is.
"""

from __future__ import annotations

import functools
import secrets
from typing import Any

import cloudpickle
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

_collective_rpc = MultiprocExecutor.collective_rpc


def keep_in_step() -> None:
    """In this process a call that fails has every worker's answer to it taken before it raises. Doing it twice does no more."""
    MultiprocExecutor.collective_rpc = _collective_rpc_of_all


@functools.wraps(_collective_rpc)
def _collective_rpc_of_all(self: MultiprocExecutor, *arguments: Any, **keywords: Any) -> Any:
    try:
        return _collective_rpc(self, *arguments, **keywords)
    except RuntimeError:  # a worker's failure; a call that took too long is a TimeoutError
        if keywords.get("unique_reply_rank") is None and not self.is_failed:
            _take_answers(self)
        raise


def _take_answers(executor: MultiprocExecutor) -> None:
    """Each worker answers one call after the other: what comes before the answer to a new one is old. Waits for workers that are
    still at it, as the call itself would have."""
    token = secrets.token_hex(8)
    executor.rpc_broadcast_mq.enqueue((cloudpickle.dumps(_echo), (token,), {}, None))
    for queue in executor.response_mqs:
        while queue.dequeue()[1] != token:
            pass


def _echo(_worker: Any, token: str) -> str:
    return token
