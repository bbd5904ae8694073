"""Fills a step's batch: prompts from rank 0, outputs from every rank's engine, verdicts beside them, decisions on rank 0.

Rank 0 holds the prompt source, the recovery buffer and the ledger. The requests of a round are dealt over the ranks one output
at a time, so that no rank waits for another's long question; each rank judges what it sampled. All ranks go in ticks:

    rank 0 decides (rollout.flight) → orders to all → each rank decodes and judges for a moment → what is judged goes to rank 0

so that verdicts are given, and with `EarlyScoring` log-probabilities recomputed, while the stragglers of a batch still decode,
and a round that is certain to be needed begins before the one before it has ended. None of this changes what is decided: the
rounds, their prompts and the order of the batch are those of Algorithm 1 taken one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rollout.draw import Draw, SamplingStalled, SamplingStopped, fits, why_stalled
from rollout.engine import Decoding, Engine, EngineError, Request
from rollout.flight import Flight, Silence
from rollout.lane import Job, Judge, Judged, Lane
from rollout.prompts import PromptSource
from rollout.ranks import Ranks
from rollout.recovery import BatchCollector, Ledger
from rollout.types import Group, Prompt

TICK_SECONDS = 0.2
"""The longest that finished outputs wait for the next decision."""
RECOVERIES = 3
"""Times that lost engines are started anew in one step before the run is given up."""


@dataclass(slots=True)
class Collected:
    """A step's batch and how it came about. `batch` is rank 0's on every rank; `sampled` is empty on ranks other than 0."""

    batch: list[Group]
    sampled: list[Group]
    rounds: int
    seconds: dict[str, float] = field(default_factory=dict)
    """On this rank. "sample": wall time but for the next two; "reward": waiting for verdicts with nothing left to decode;
    "score_early": early scoring; "reward_hidden": judging while something decoded, which took no time of its own."""
    early: tuple[bool, ...] = ()
    """Which groups of the batch were handed to `score` on the way, in that order; empty where none was."""
    engine_restarts: int = 0


@dataclass(slots=True)
class SamplerState:
    """What must survive a restart; on rank 0."""

    ledger: Ledger = field(default_factory=Ledger)
    buffer: list[Group] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EarlyScoring:
    """score: a collective, called on every rank with the same groups. tokens: as many must be certain of a place before it is."""

    score: Callable[[Sequence[Group]], object]
    tokens: int


@dataclass(frozen=True, slots=True)
class Orders:
    """From rank 0 to all ranks, each tick; in this order: lost, ended, prompts, score."""

    lost: tuple[str | None, ...] = ()
    """What befell each rank's engine, where any is lost."""
    ended: bool = False
    failed: str = ""
    stalled: str = ""
    stopped: bool = False
    prompts: tuple[tuple[int, Prompt, np.ndarray], ...] = ()
    """A round's (place, prompt, token ids), without those that are too long."""
    round: int = -1
    score: tuple[Group, ...] = ()


@dataclass(slots=True)
class _Flying:
    """What the ticks of one step or evaluation share; the fields from `flight` on are rank 0's."""

    decoding: Decoding
    group_size: int
    seed: Callable[[int], tuple[int, ...]]
    """Of a round, for engines that draw a whole batch from one generator."""
    phase: str
    early: EarlyScoring | None
    abort: bool
    longest: int | None
    restarts_left: int
    max_unjudged_rounds: int | None
    flight: Flight | None
    draw: Callable[[Flight], Sequence[Prompt]]
    """The prompts to draw now, given what is in flight; none where no more are needed, or may be drawn."""
    why_stalled: Callable[[Flight], str]
    note: Callable[[Flight], str]
    errors: Sequence[str | None] = ()
    scored: list[int] = field(default_factory=list)
    restarts: int = 0
    stopped: bool = False


Encode = Callable[[Prompt], list[int]]
Recover = Callable[[Sequence[str | None]], None]
"""A collective: makes lost engines usable again, with the weights they had (`rollout.weights.sync.WeightSync.recover`). Given
what befell each rank's. Raises EngineError, on every rank, where that fails."""


class Sampler:
    """One a rank. `source` is needed on rank 0 alone. phase: the console's `phase(name, total, unit)`. recover: None where a lost
    engine ends the step. overlap: False for one thing after the other, with the same outcome. hosts: the ranks whose
    engines are asked; None: all. stopping: whether the run is to stop; asked on every rank, decided on rank 0. judge_seconds: see
    `rollout.lane.Lane`."""

    def __init__(
        self,
        engine: Engine,
        judge: Judge,
        encode: Encode,
        ranks: Ranks,
        phase: Callable[..., Any],
        seed: int,
        recover: Recover | None = None,
        *,
        overlap: bool = True,
        hosts: Sequence[int] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        judge_seconds: Callable[[int], float] | None = None,
    ) -> None:
        self._stopping, self._judge_seconds = stopping, judge_seconds
        self._engine = engine
        self._judge = judge
        self._encode = encode
        self._ranks = ranks
        self._phase = phase
        self._seed = seed
        self._recover = recover
        self._overlap = overlap
        hosts = range(ranks.size) if hosts is None else hosts
        self._lane = hosts.index(ranks.rank) if ranks.rank in hosts else None
        self._lanes = len(hosts)
        self._restarts = 0 if recover is None else RECOVERIES
        self._silence = Silence()
        self.state = SamplerState()

    def collect(self, draw: Draw, source: PromptSource | None, early: EarlyScoring | None = None) -> Collected:
        """Algorithm 1's loop for one step. Raises, on every rank: SamplingStalled where max_rounds rounds find no N groups;
        SamplingStopped; EngineError where an engine is lost for good, or the judge silent for max_unjudged_rounds, and then the
        ledger and the cursor are somewhere within the step."""
        state = self.state
        recovered = self._recovered(draw)
        collector = BatchCollector(draw.step, draw.groups, draw.dynamic, recovered, state.ledger)
        flight = Flight(draw.step, draw.group_size, draw.groups, draw.dynamic, len(recovered), self._silence)
        flying = _Flying(
            decoding=draw.decoding, group_size=draw.group_size, seed=lambda number: (draw.step, number), phase="sampling",
            early=early, abort=draw.abort_surplus, longest=draw.max_prompt_tokens, restarts_left=self._restarts,
            max_unjudged_rounds=draw.max_unjudged_rounds, flight=flight if self._ranks.first else None,
            draw=lambda flight: self._draw_prompts(draw, flight, source),
            why_stalled=lambda flight: why_stalled(draw, flight),
            note=lambda flight: f"{flight.finished()}/{draw.groups}",
        )  # fmt: skip
        try:
            seconds, rounds = self._fly(flying)
        finally:
            self._silence = flight.silent()
        if not self._ranks.first:
            batch, marks = self._ranks.broadcast(None)
            return Collected(batch, [], rounds, seconds, marks, flying.restarts)
        for each in flight.outcome():
            collector.add_round(each.groups, each.drawn, each.aborted)
        batch, state.buffer = collector.finish(recover=draw.recover, capacity=draw.capacity, max_age=draw.max_age)
        scored = {id(flight.group(place)) for place in flying.scored}
        marks = tuple(id(group) in scored for group in batch) if scored else ()
        self._ranks.broadcast((batch, marks))
        return Collected(batch, collector.sampled, rounds, seconds, marks, flying.restarts)

    def sample_groups(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        decoding: Decoding,
        *,
        seed: tuple[int, ...],
        step: int = 0,
        phase: str = "sampling",
        note: str = "",
    ) -> list[Group]:
        """G outputs of each prompt under the current weights, with verdicts, outside the ledger; on rank 0 the groups, elsewhere
        an empty list. Raises, on every rank: EngineError where an engine is lost for good; SamplingStopped."""
        if not prompts:
            return []
        flight = Flight(step, group_size, needed=0, dynamic=False)
        flying = _Flying(
            decoding=decoding, group_size=group_size, seed=lambda _: seed, phase=phase, early=None, abort=False, longest=None,
            restarts_left=self._restarts, max_unjudged_rounds=None, flight=flight if self._ranks.first else None,
            draw=lambda flight: () if flight.rounds else prompts, why_stalled=lambda _: "", note=lambda _: note,
        )  # fmt: skip
        self._fly(flying)
        return flight.outcome()[0].groups if self._ranks.first else []

    # the ticks

    def _fly(self, flying: _Flying) -> tuple[dict[str, float], int]:
        """Until rank 0 has what it needs. Returns (seconds, rounds) of this rank."""
        seconds = {"score_early": 0.0}
        start = time.perf_counter()
        rounds = 0
        streams = self._engine.streams and self._overlap
        lane = Lane(self._engine, self._judge, self._advance, overlap=self._overlap, judge_seconds=self._judge_seconds)
        with ExitStack() as phases, lane:
            self._facts = {}
            while True:
                first = flying.flight is not None
                flying.stopped |= self._stopping()
                orders = self._ranks.broadcast(decide(flying, streams, self._ids) if first else None)
                if orders.stopped:
                    self._quietly(lane.abort)
                    raise SamplingStopped
                if orders.failed or orders.stalled:
                    self._quietly(lane.abort)
                    raise EngineError(orders.failed) if orders.failed else SamplingStalled(orders.stalled)
                error = self._start_anew(lane, flying, orders.lost) if orders.lost else None
                if orders.ended:
                    self._quietly(lane.abort)
                    break
                rounds = max(rounds, orders.round + 1)
                if orders.prompts:
                    error = self._begin_round(lane, flying, orders, phases) or error
                if orders.score:
                    before = time.perf_counter()
                    flying.early.score(orders.score)
                    seconds["score_early"] += time.perf_counter() - before
                self._tick(lane, flying, error)
        whole = time.perf_counter() - start
        seconds |= {"reward": lane.waited, "reward_hidden": max(0.0, lane.judging - lane.waited)}
        return seconds | {"sample": whole - lane.waited - seconds["score_early"]}, rounds

    def _begin_round(self, lane: Lane, flying: _Flying, orders: Orders, phases: ExitStack) -> str | None:
        """This rank's share of a round goes to its engine. Returns what went wrong."""
        jobs = self._share(flying, orders)
        phases.close()
        total = len(lane.unsampled()) + len(jobs)
        self._bar = phases.enter_context(self._phase(flying.phase, total, "outputs"))
        seed = self._derive_seed(self._ranks.rank, *flying.seed(orders.round))
        return self._quietly(lambda: lane.add(jobs, replace(flying.decoding, seed=seed)))

    def _share(self, flying: _Flying, orders: Orders) -> list[Job]:
        """Output k of all of a round goes to host k modulo the number of hosts, on which its seed does not depend."""
        if self._lane is None:
            return []
        jobs = [
            Job(place, output, prompt, Request(ids, self._derive_seed(*flying.seed(orders.round), place, output, 1)))
            for place, prompt, ids in orders.prompts
            for output in range(flying.group_size)
        ]
        return jobs[self._lane :: self._lanes]

    def _tick(self, lane: Lane, flying: _Flying, error: str | None) -> None:
        judged: list[Judged] = []
        stopped = False
        if error is None:
            try:
                judged = lane.poll(TICK_SECONDS)
            except EngineError as lost:
                error = str(lost)
            except SamplingStopped:
                stopped = True
        parts = self._ranks.gather((judged, error, stopped))
        if flying.flight is not None:
            for part, _, _ in parts:
                flying.flight.take(part)
            flying.errors = tuple(each for _, each, _ in parts)
            flying.stopped |= any(each for _, _, each in parts)
            self._facts["groups"] = flying.note(flying.flight)

    def _start_anew(self, lane: Lane, flying: _Flying, lost: Sequence[str | None]) -> str | None:
        """All engines take their weights again; what was not sampled is asked for again."""
        jobs = lane.unsampled()
        self._quietly(lane.abort)
        flying.restarts += 1
        assert self._recover is not None
        self._recover(lost)
        seed = self._derive_seed(self._ranks.rank, *flying.seed(0), flying.restarts, 2)
        return self._quietly(lambda: lane.add(jobs, replace(flying.decoding, seed=seed)))

    @staticmethod
    def _quietly(action: Callable[[], None]) -> str | None:
        """An engine's error as text: every rank must come to the next gather."""
        try:
            action()
        except EngineError as error:
            return str(error)
        return None

    def _advance(self, outputs: int, tokens: int) -> None:
        if not self._engine.streams and self._stopping():
            raise SamplingStopped  # nobody waits for a batch that nobody will train on
        self._bar.advance(outputs, **({"tokens": tokens, **self._facts} if outputs or tokens else {}))

    def _draw_prompts(self, draw: Draw, flight: Flight, source: PromptSource) -> Sequence[Prompt]:
        """Algorithm 1 draws a whole round; without dynamic sampling, just what is missing. At least one round is drawn."""
        missing = draw.groups - flight.possible()
        if flight.rounds and (missing <= 0 or flight.rounds >= draw.max_rounds):
            return ()
        return source.draw(draw.prompts_per_round if draw.dynamic else min(draw.prompts_per_round, missing))

    def _recovered(self, draw: Draw) -> list[Group]:
        """The buffer. What this stage cannot use (no recovery, another G, tighter token limits than before) expires."""
        usable = [group for group in self.state.buffer if draw.recover and fits(group, draw)]
        self.state.ledger.expired += len(self.state.buffer) - len(usable)
        self.state.buffer = []
        return usable

    def _ids(self, prompt: Prompt) -> np.ndarray:
        return np.asarray(self._encode(prompt), dtype=np.int32)

    def _derive_seed(self, *parts: int) -> int:
        """From the run's seed and where in the run it is: nothing to save, nothing to drift."""
        return int(np.random.SeedSequence([self._seed, *parts]).generate_state(1, np.uint64)[0] >> 1)


def decide(flying: _Flying, streams: bool, encode: Callable[[Prompt], np.ndarray]) -> Orders:
    """Rank 0's next orders. streams: whether the engines take more requests while they decode."""
    flight = flying.flight
    if flying.stopped:
        return Orders(stopped=True)
    if any(flying.errors):
        lost, flying.errors = tuple(flying.errors), ()
        if not flying.restarts_left:
            again = f", after {flying.restarts} restarts in one step" if flying.restarts else ""
            return Orders(failed="; ".join(each for each in lost if each) + again)
        flying.restarts_left -= 1
        return Orders(lost=lost)
    enough = flight.finished() >= flight.needed
    if enough and (flying.abort or (flight.rounds and flight.landed)):
        return Orders(ended=True)
    silence = flight.silent()
    if flying.max_unjudged_rounds is not None and silence.rounds >= flying.max_unjudged_rounds:
        return Orders(failed=f"the judge gave no verdict in {silence.rounds} rounds in a row, the last time for: {silence.why}")
    prompts = tuple(flying.draw(flight)) if streams or flight.landed else ()
    if not prompts and flight.landed:
        return Orders(stalled=flying.why_stalled(flight))
    orders = Orders(score=_certain(flying))
    if not prompts:
        return orders
    encoded = [encode(prompt) for prompt in prompts]
    places = flight.draw(prompts, encoded, flying.longest)
    fitting = [each for each in zip(places, prompts, encoded, strict=True) if not flight.drawn[each[0]].failed]
    return replace(orders, prompts=tuple(fitting), round=flight.rounds - 1)


def _certain(flying: _Flying) -> tuple[Group, ...]:
    """Groups to be scored now: certain of their place, not scored yet, and enough of them."""
    if flying.early is None:
        return ()
    done = set(flying.scored)
    places = [place for place in flying.flight.certain() if place not in done]
    groups = tuple(flying.flight.group(place) for place in places)
    tokens = sum(len(group.prompt_token_ids) + len(sample.token_ids) for group in groups for sample in group.samples)
    if tokens < flying.early.tokens:
        return ()
    flying.scored += places
    return groups
