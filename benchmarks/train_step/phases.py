"""Where the time of a scoring or an update goes: marks that the actor's own modules and optimizer set as they run.

Each mark ends what ran since the one before, so that the phases sum to the whole:

    forward      until the output head begins
    loss head    until the gradient of its hidden states is there (while scoring: until it ends)
    backward     until the backward ends, what checkpointing computes again included
    clip         until the optimizer begins: the gradients' norm, the clip, the sums over ranks
    optimizer    its step
    other        the rest: batches laid out and sent to the device, gradients freed

Hooks stand before FSDP's own, so that a unit's gathering belongs to what needs it. On a GPU marks are events on the stream that
computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from trainer.actor import Actor

FORWARD, HEAD, BACKWARD, CLIP, OPTIMIZER, OTHER = PHASES = ("forward", "loss head", "backward", "clip", "optimizer", "other")


def split(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds by phase. marks: (what ended, when), in order; the first one begins."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for (_, before), (phase, now) in pairwise(marks):
        seconds[phase] += now - before
    return seconds


class Marks:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, ended: str) -> None:
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((ended, now))

    def seconds(self) -> dict[str, float]:
        """By phase; waits for the device."""
        if self._device.type != "cuda":
            return split(self._marks)
        torch.cuda.synchronize(self._device)
        _, first = self._marks[0]
        return split([(phase, first.elapsed_time(event) / 1000) for phase, event in self._marks])


@contextmanager
def watched(actor: Actor) -> Iterator[Marks]:
    """Marks of one call of the actor's within the block."""
    marks = Marks(actor.device)
    head = actor.policy.causal_lm.lm_head

    def backward_of_head_ended(_gradient: torch.Tensor) -> None:
        marks.mark(HEAD)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: marks.mark(BACKWARD))

    def head_begins(_module: Any, arguments: tuple) -> None:
        marks.mark(FORWARD)
        if arguments[0].requires_grad:
            arguments[0].register_hook(backward_of_head_ended)

    def head_ended(_module: Any, arguments: tuple, _result: Any) -> None:
        if not arguments[0].requires_grad:
            marks.mark(HEAD)

    hooks = [
        actor.policy.register_forward_pre_hook(lambda *_: marks.mark(OTHER), prepend=True),
        head.register_forward_pre_hook(head_begins, prepend=True),
        head.register_forward_hook(head_ended),
        actor.optimizer.register_step_pre_hook(lambda *_: marks.mark(CLIP)),
        actor.optimizer.register_step_post_hook(lambda *_: marks.mark(OPTIMIZER)),
    ]
    marks.mark(OTHER)
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()
    marks.mark(OTHER)
