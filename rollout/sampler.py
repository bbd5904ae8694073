"""Fills a step's batch: prompts from rank 0, outputs from every rank's engine, verdicts beside them, decisions on rank 0.

Rank 0 holds the prompt source, the recovery buffer and the ledger. In a round it draws prompts; the requests are dealt over the
ranks one output at a time, so that no rank waits for another's long question; each rank judges what it sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from rollout.engine import Decoding, Engine, Request
from rollout.errors import InputError
from rollout.prompts import PromptSource
from rollout.ranks import Ranks
from rollout.recovery import BatchCollector, Ledger
from rollout.types import Group, Prompt, Sample, Verdict


class Judge(Protocol):
    """`rollout.reward.pipeline.Reward` is one."""

    def judge(self, pairs: Sequence[tuple[Prompt, Sample]]) -> list[Verdict]: ...


class SamplingStalled(InputError):
    """A step did not find its N groups in the rounds it may take: the prompts do not suit the policy, which a user can mend."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What a step asks of the sampler."""

    step: int
    groups: int
    group_size: int
    prompts_per_round: int
    dynamic: bool
    max_rounds: int
    max_prompt_tokens: int
    recover: bool
    capacity: int | None
    decoding: Decoding


@dataclass(slots=True)
class Collected:
    """A step's batch and how it came about. `batch` is rank 0's on every rank; `sampled` is empty on ranks other than 0."""

    batch: list[Group]
    sampled: list[Group]
    rounds: int
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time on this rank: "sample", "reward"."""


@dataclass(slots=True)
class SamplerState:
    """What must survive a restart; on rank 0."""

    ledger: Ledger = field(default_factory=Ledger)
    buffer: list[Group] = field(default_factory=list)


Encode = Callable[[Prompt], list[int]]


class Sampler:
    """One a rank. `source` is needed on rank 0 alone. phase: the console's `phase(name, total, unit)`."""

    def __init__(self, engine: Engine, judge: Judge, encode: Encode, ranks: Ranks, phase: Callable[..., Any], seed: int) -> None:
        self._engine = engine
        self._judge = judge
        self._encode = encode
        self._ranks = ranks
        self._phase = phase
        self._seed = seed
        self.state = SamplerState()

    def collect(self, draw: Draw, source: PromptSource | None) -> Collected:
        """Algorithm 1's loop for one step. Raises SamplingStalled, on every rank, where max_rounds rounds find no N groups."""
        state, ranks = self.state, self._ranks
        collector = BatchCollector(draw.step, draw.groups, draw.dynamic, self._recovered(draw), state.ledger)
        seconds = {"sample": 0.0, "reward": 0.0}
        complete = False
        while not complete:
            prompts = ranks.broadcast(self._draw_prompts(draw, collector, source) if ranks.first else None)
            groups = self.sample_groups(
                prompts, draw.group_size, draw.decoding, seed=(draw.step, collector.rounds), seconds=seconds,
                step=draw.step, max_prompt_tokens=draw.max_prompt_tokens,
                note=f"{collector.collected}/{draw.groups}",
            )  # fmt: skip
            if ranks.first:
                collector.add_round(groups, drawn=len(prompts))
            else:
                collector.rounds += 1
            complete, why_stalled = ranks.broadcast((collector.complete, self._why_stalled(collector, draw)))
            if why_stalled:
                raise SamplingStalled(why_stalled)
        if not ranks.first:
            return Collected(ranks.broadcast(None), [], collector.rounds, seconds)
        batch, state.buffer = collector.finish(recover=draw.recover, capacity=draw.capacity)
        return Collected(ranks.broadcast(batch), collector.sampled, collector.rounds, seconds)

    def sample_groups(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        decoding: Decoding,
        *,
        seed: tuple[int, ...],
        seconds: dict[str, float],
        step: int = 0,
        max_prompt_tokens: int | None = None,
        phase: str = "sampling",
        note: str = "",
    ) -> list[Group]:
        """G outputs of each prompt under the current weights, with verdicts; on rank 0 the groups, elsewhere an empty list.

        A prompt of more than `max_prompt_tokens` tokens gives no group. Wall time is added to seconds["sample"] and ["reward"].
        """
        encoded = [np.asarray(self._encode(prompt), dtype=np.int32) for prompt in prompts]
        fits = [index for index, ids in enumerate(encoded) if max_prompt_tokens is None or len(ids) <= max_prompt_tokens]
        jobs = [index for index in fits for _ in range(group_size)][self._ranks.rank :: self._ranks.size]
        requests = [Request(encoded[index]) for index in jobs]
        decoding = replace(decoding, seed=self._derive_seed(*seed))
        start = time.perf_counter()
        with self._phase(phase, len(requests), "outputs") as bar:
            samples = self._engine.generate(requests, decoding, lambda n, tokens: bar.advance(n, tokens=tokens, groups=note))
        sampled = time.perf_counter()
        verdicts = self._judge.judge([(prompts[index], sample) for index, sample in zip(jobs, samples, strict=True)])
        seconds["sample"] += sampled - start
        seconds["reward"] += time.perf_counter() - sampled
        parts = self._ranks.gather(list(zip(samples, verdicts, strict=True)))
        return [] if parts is None else self._assemble(prompts, encoded, fits, group_size, parts, step)

    @staticmethod
    def _assemble(
        prompts: Sequence[Prompt],
        encoded: Sequence[np.ndarray],
        fits: Sequence[int],
        group_size: int,
        parts: Sequence[Sequence[tuple[Sample, Verdict]]],
        step: int,
    ) -> list[Group]:
        """Undoes the dealing: output k of all went to rank k modulo the number of ranks."""
        outputs = [parts[k % len(parts)][k // len(parts)] for k in range(len(fits) * group_size)]
        return [
            Group(
                prompt=prompts[index],
                prompt_token_ids=encoded[index],
                samples=tuple(sample for sample, _ in outputs[place * group_size : (place + 1) * group_size]),
                verdicts=tuple(verdict for _, verdict in outputs[place * group_size : (place + 1) * group_size]),
                drawn_step=step,
            )
            for place, index in enumerate(fits)
        ]

    def _recovered(self, draw: Draw) -> list[Group]:
        """The buffer. What this stage cannot use (no recovery, another G, tighter token limits than before) expires."""
        usable = [group for group in self.state.buffer if draw.recover and _fits(group, draw)]
        self.state.ledger.expired += len(self.state.buffer) - len(usable)
        self.state.buffer = []
        return usable

    def _draw_prompts(self, draw: Draw, collector: BatchCollector, source: PromptSource) -> list[Prompt]:
        """Algorithm 1 draws a whole round; without dynamic sampling, just what is missing."""
        wanted = draw.prompts_per_round if draw.dynamic else min(draw.prompts_per_round, draw.groups - collector.collected)
        return source.draw(wanted)

    def _derive_seed(self, *parts: int) -> int:
        """A seed for this rank's engine from the run's seed and where in the run it is: nothing to save, nothing to drift."""
        entropy = np.random.SeedSequence([self._seed, self._ranks.rank, *parts])
        return int(entropy.generate_state(1, np.uint64)[0] >> 1)

    def _why_stalled(self, collector: BatchCollector, draw: Draw) -> str:
        """Empty while the step may go on."""
        if collector.complete or collector.rounds < draw.max_rounds:
            return ""
        easy = sum(group.right == len(group.verdicts) for group in collector.sampled)
        hard = sum(group.right == 0 for group in collector.sampled)
        return (
            f"step {draw.step + 1}: {collector.collected} of {draw.groups} groups after {collector.rounds} rounds "
            f"({len(collector.sampled)} groups sampled: {easy} all right, {hard} all wrong); "
            "raise batch.max_rounds, or change the prompts: too easy or too hard for this policy"
        )


def _fits(group: Group, draw: Draw) -> bool:
    """Whether a group of an earlier step could have been drawn under this step's settings."""
    return (
        len(group.samples) == draw.group_size
        and len(group.prompt_token_ids) <= draw.max_prompt_tokens
        and all(len(sample.token_ids) <= draw.decoding.max_new_tokens for sample in group.samples)
    )
