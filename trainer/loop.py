"""The training loop: sample, score, update, sync, measure, keep; stage after stage, from where the run folder left off.

Every method of `TrainingLoop` is called by all ranks together. What must survive a restart lies on rank 0: the sampler's ledger
and recovery buffer, the prompt sources' cursors, and the number of finished steps, which is also the weight version.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch

from rollout.engine import Decoding, EngineError
from rollout.errors import InputError, RunStopped
from rollout.prompts import PromptSource
from rollout.ranks import Ranks
from rollout.sampler import Collected, Draw, EarlyScoring, SamplerState, SamplingStalled, SamplingStopped
from rollout.types import Group
from trainer import host_memory
from trainer.actor import ScoredMiniBatch, Scoring
from trainer.alarms import Alarms
from trainer.batch import MiniBatch, mini_batch, mini_batches
from trainer.checkpoint import Checkpoints, RunState
from trainer.config import RunConfig, StageConfig
from trainer.config_file import dump_config
from trainer.cursors import go_on
from trainer.evaluation import evaluate
from trainer.guards import Guard
from trainer.lookahead import Lookahead
from trainer.metrics import MetricsWriter, train_rows
from trainer.mismatch import bounded, bounds_of, mismatch_row
from trainer.preflight import Inputs, source_key
from trainer.quarantine import Quarantine
from trainer.sample_recorder import SampleRecorder
from trainer.setup import Parts
from trainer.step_row import step_row, unjudged_note


class StoppedAsAsked(Exception):
    """The run was asked to stop, and has; what it learnt in `step` steps is kept."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}; the same command continues")


class TrainingLoop:
    """inputs: rank 0's prompts, None elsewhere. console: the real one on rank 0."""

    def __init__(self, config: RunConfig, inputs: Inputs | None, parts: Parts, ranks: Ranks, console: Any) -> None:
        self.config, self.inputs, self.parts, self.ranks, self.console = config, inputs, parts, ranks, console
        self.checkpoints = Checkpoints(config.run, ranks, config.checkpoint, console.note, self.score_of)
        self.metrics: MetricsWriter | None = None
        self.bounds = bounds_of(config, parts.precision)
        together = config.parallel.sequence_ranks
        self.quarantine = Quarantine(config.run, config.guards.keep, ranks, together, console.note)
        self.samples = SampleRecorder(config, ranks, parts.reader, console.note)
        self.guard = Guard(config.guards, str(self.quarantine.folder), console.note)
        self.alarms = Alarms(config.alarms, config.stages, console.note, console.alarms)
        self.ahead = Lookahead(ranks.pulse.stir)

    def run(self) -> None:
        """To the end of the last stage. However it ends, a checkpoint that is being written is finished. Raises
        StoppedAsAsked where it was asked to stop before, RunStopped where a guard or an alarm stops it."""
        try:
            with self.checkpoints:
                self.run_steps()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    def run_steps(self) -> None:
        step = self.resume()
        self.push_weights(step)
        if self.ranks.broadcast(self.metrics is not None and self.owes_evaluation(step)):
            self.evaluate(step)
        while step < self.config.total_steps:
            step = self.train_step(step)
            if self.due(step, self.config.evaluation.every):
                self.evaluate(step)
            if self.due(step, self.config.checkpoint.every):
                self.save(self.state(step), wait=step == self.config.total_steps)

    def train_step(self, step: int) -> int:
        """One step of the recipe. Returns how many steps are finished now."""
        stage = self.config.stages[self.config.stage_of(step)]
        self.ranks.pulse.step = step + 1
        clock = Clock()
        scoring = self.early_scoring(stage)
        before = self.state(step)
        collected = self.collect(step, stage, scoring)
        kept = self.state(step)
        clock.lap("sample")
        if self.config.engine.one_step_off:
            if (lost := self.try_push(step)) is not None:
                self.stop(before, lost)
            self.look_ahead(step + 1)
        else:
            self.parts.engine.sleep()
        clock.lap("sync")
        batches = mini_batches(collected.batch, stage, step)
        sequences = sum(len(batch.sequences) for batch in batches) // self.ranks.size
        with self.console.phase("scoring", sequences, "sequences") as bar:
            scored = self.score(collected, batches, stage, step, scoring, bar.advance)
        mismatch = bounded(mismatch_row([batch.mismatch for batch in scored]), self.bounds)
        clock.lap("score")
        with self.console.phase("update", sequences, "sequences") as bar:
            updates = [self.parts.actor.update(batch, stage, bar.advance) for batch in scored]
        self.guard.see(step + 1, [update.fault for update in updates])
        self.quarantine.keep(step + 1, collected.batch, scored, updates)
        clock.lap("update")
        self.samples.keep(step + 1, collected, kept.buffer, scored)
        clock.lap("samples")
        lost = None if self.config.engine.one_step_off else self.try_push(step + 1)
        clock.lap("sync")
        if self.ranks.first:
            row = step_row(collected, scored, updates, kept.ledger, len(kept.buffer), stage)
            row |= mismatch | self.parts.sync.measured() | self.parts.judged() | self.checkpoints.measured()
            row |= self.clocked(clock, collected, batches)
            if (note := unjudged_note(collected.sampled)) is not None:
                self.console.note(f"step {step + 1}: {note}")
            self.write(step + 1, stage, row)
        if lost is not None:
            self.stop(self.state(step + 1), lost)
        self.stop_if_told(step + 1)
        return step + 1

    # sampling

    def collect(self, step: int, stage: StageConfig, scoring: Scoring | None) -> Collected:
        """This step's batch. Where the engines are lost for good, the step begins anew when the run is resumed."""
        if self.ahead.started:
            try:
                return self.ahead.take()
            except EngineError as error:
                self.console.note(f"step {step + 1}: {error}; sampled anew from the weights of now")
                self.restore(self.ahead.before)
                if (lost := self.try_push(step)) is not None:
                    self.stop(self.state(step), lost)
            except SamplingStalled:
                self.keep(self.ahead.before)
                raise
            except SamplingStopped:
                self.stop_as_asked(self.ahead.before)
        before = self.state(step)
        early = None
        if scoring is not None:
            budget = self.ranks.size * stage.actor.tokens_per_micro_batch
            early = EarlyScoring(lambda groups: scoring.add(part_of(groups, stage, step)), budget)
        try:
            return self.parts.sampler.collect(self.draw(step, stage), self.source(stage), early)
        except EngineError as error:
            self.stop(before, error)
        except SamplingStalled:
            self.keep(before)
            raise
        except SamplingStopped:
            self.stop_as_asked(before)

    def look_ahead(self, step: int) -> None:
        """Starts sampling step `step`, unless the run ends before it."""
        if step < self.config.total_steps:
            stage = self.config.stages[self.config.stage_of(step)]
            draw, source, sampler = self.draw(step, stage), self.source(stage), self.parts.sampler
            self.ahead.start(self.state(step), lambda: sampler.collect(draw, source))

    def early_scoring(self, stage: StageConfig) -> Scoring | None:
        """What scores groups while others are still sampled, where that is wanted and possible."""
        wanted = self.config.engine.score_early
        if wanted is None:
            wanted = self.config.engine.kind == "vllm-server" and not self.config.engine.one_step_off
        if not wanted or stage.batch.mini_batches > 1:
            return None
        return Scoring(self.parts.actor, stage, self.bounds.token)

    def score(
        self, collected: Collected, batches: list[MiniBatch], stage: StageConfig, step: int, scoring: Scoring | None, advance: Any
    ) -> list[ScoredMiniBatch]:
        """The batch under the weights of now; what was scored on the way is not scored again."""
        if scoring is None or not any(collected.early):
            return self.parts.actor.score(batches, stage, advance, self.bounds.token)
        rest = [group for group, early in zip(collected.batch, collected.early, strict=True) if not early]
        if rest:
            scoring.add(part_of(rest, stage, step), advance)
        (whole,) = batches
        return [scoring.finish(whole)]

    def keep(self, state: RunState) -> None:
        """Before an end that a user can mend and go on from; of a run that has not learnt anything yet nothing is kept."""
        if state.step:
            self.save(state, wait=True)

    def stop(self, state: RunState, error: EngineError) -> NoReturn:
        """No engine, no run: what was learnt so far is kept."""
        try:
            self.save(state, wait=True)
        except InputError as lost:
            raise InputError(f"{lost}; it was to be kept because {error}") from error
        raise EngineError(f"{error}; stopped after step {state.step}, which is kept: the same command continues from there")

    def stop_as_asked(self, state: RunState) -> NoReturn:
        """state: before the sampling that was abandoned."""
        self.keep(state)
        raise StoppedAsAsked(state.step)

    def stop_if_told(self, step: int) -> None:
        """Ends the run after `step` finished steps where the guard or an alarm that may says so."""
        why = self.ranks.broadcast(self.guard.why_stop() or self.alarms.why_stop() if self.ranks.first else None)
        if why is not None:
            self.save(self.state(step), wait=True)
            raise RunStopped(f"{why}; stopped after step {step}, which is kept: the same command continues from there")

    def draw(self, step: int, stage: StageConfig) -> Draw:
        """What this step asks of the sampler."""
        batch = stage.batch
        return Draw(
            step=step,
            groups=batch.groups,
            group_size=batch.group_size,
            prompts_per_round=batch.prompts_per_round or batch.groups,
            dynamic=batch.dynamic,
            max_rounds=batch.max_rounds,
            max_prompt_tokens=stage.data.max_prompt_tokens,
            recover=stage.recovery.enabled,
            capacity=stage.recovery.capacity,
            max_age=stage.recovery.max_age,
            decoding=Decoding(stage.response_limit, stage.sampling.temperature),
            max_unjudged_rounds=self.config.reward.judge.max_unjudged_rounds if self.config.reward.judge else None,
            abort_surplus=batch.abort_surplus,
        )

    def source(self, stage: StageConfig) -> PromptSource | None:
        return self.inputs.sources[source_key(stage.data.train)] if self.inputs is not None else None

    def push_weights(self, version: int) -> None:
        """Engines sample from version `version` from here on. Raises EngineError where that fails twice."""
        if self.parts.sync.version == version and self.parts.engine.version == version:
            return
        torch.cuda.empty_cache()  # or a sleeping engine wakes on a GPU whose memory is still held for the next update
        with self.console.phase("sync", None, "tensors") as bar:
            self.parts.sync.push(version, bar.advance)

    def try_push(self, version: int) -> EngineError | None:
        """`push_weights`, whose failure must not lose the step that was trained."""
        try:
            self.push_weights(version)
        except EngineError as error:
            return error
        return None

    def due(self, step: int, every: int | None) -> bool:
        return step == self.config.total_steps or (every is not None and step % every == 0)

    def owes_evaluation(self, step: int) -> bool:
        """Whether an evaluation after `step` is due and not recorded: the first, or one that a stop cut short. On rank 0."""
        due = step == 0 or self.due(step, self.config.evaluation.every)
        return due and any(not self.metrics.has_evaluation(step, each.name) for each in self.config.evaluation.sets)

    def evaluate(self, step: int) -> None:
        sets = self.inputs.evaluation if self.inputs is not None else {}
        self.ahead.wait()  # one generation at a time
        try:
            self.push_weights(step)
            rows = evaluate(self.parts.sampler, sets, self.config, self.ranks, step)
        except EngineError as error:
            self.stop(self.state(step), error)
        except SamplingStopped:
            self.stop_as_asked(self.state(step))
        for row in rows:
            self.metrics.write(row)
            self.console.evaluation(row)

    def save(self, state: RunState, wait: bool = False) -> None:
        with self.console.phase("checkpoint", None, "files"):
            self.ranks.pulse.held = host_memory.held()  # before a thread has a checkpoint's bytes in hand
            hindrance = self.metrics.hindrance() if self.metrics is not None else None
            self.checkpoints.save(self.parts.actor, state, wait, hindrance)

    def score_of(self, step: int) -> float | None:
        """What the step's evaluation gave; on rank 0."""
        return self.metrics.score(step) if self.metrics is not None else None

    def state(self, step: int) -> RunState:
        """What must survive after `step` finished steps. A step that is being sampled ahead has not begun."""
        if self.ahead.started and self.ahead.before.step == step:
            return self.ahead.before
        sampler, sources = self.parts.sampler.state, self.inputs.sources if self.inputs is not None else {}
        return RunState(
            step, replace(sampler.ledger), list(sampler.buffer), {key: source.state() for key, source in sources.items()}
        )

    def resume(self) -> int:
        """Restores the newest complete checkpoint, if any, and opens the metrics where it left off. Returns finished steps.

        Only then is the configuration written: until here, what the folder holds may prove not to go with it.
        """
        state = self.checkpoints.resume(self.parts.actor)
        if self.ranks.first:
            self.restore(state)
            try:
                self.open_records(state.step)
            except OSError as error:
                where = error.filename or self.config.run
                raise InputError(f"{where}: {error.strerror}; free space there, or mend what the system says") from error
            if state.step:
                self.console.resumed(state.step)
        return state.step

    def open_records(self, step: int) -> None:
        """The metrics as they were after `step`, what guard and alarms know from them, the configuration. Raises OSError."""
        self.metrics = MetricsWriter(self.config.run, resume_after=step or None, note=self.console.note)
        self.samples.resume(step)
        past = train_rows(self.config.run)
        self.guard.recall(past)
        self.alarms.recall(past)
        dump_config(self.config, self.config.run / "config.yaml")

    def restore(self, state: RunState) -> None:
        """The sampler and the prompt sources as they were; on rank 0."""
        if self.inputs is None:
            return
        self.parts.sampler.state = SamplerState(replace(state.ledger), list(state.buffer))
        for old, new in go_on(self.config, self.inputs.sources, state.sources, state.step).items():
            self.console.note(f"{new}: the prompts of {old}, which is not read any more: goes on where that was")

    def write(self, step: int, stage: StageConfig, measured: dict[str, Any]) -> None:
        head = {
            "kind": "train",
            "step": step,
            "stage": self.config.stage_of(step - 1),
            "stage_name": stage.name,
            "context": stage.context,
            "weight_version": step,
        }
        row = head | measured | self.parts.paths()
        row |= self.alarms.see(row)
        self.metrics.write(row)
        self.console.step(row)

    def clocked(self, clock: Clock, collected: Collected, batches: list) -> dict[str, float]:
        """Seconds, rates and memory of a step, on this rank."""
        seconds = clock.seconds | collected.seconds
        if self.config.engine.one_step_off:
            seconds["wait"] = clock.seconds["sample"]  # the rest of the sampling lay behind the last step
        sampled = sum(len(sample.token_ids) for group in collected.sampled for sample in group.samples)
        trained = sum(len(sequence) for batch in batches for sequence in batch.sequences)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        row = {f"time/{phase}": value for phase, value in seconds.items()} | {"time/step": clock.total()}
        if held := self.ranks.pulse.held:
            row["memory/held_gib"] = held / 2**30
        return row | {
            "rate/sample": sampled / seconds["sample"],
            "rate/update": trained / (seconds["score"] + seconds["score_early"] + seconds["update"]),
            "memory/rss_gib": peak,
        }


def part_of(groups: Sequence[Group], stage: StageConfig, step: int) -> MiniBatch:
    """Some groups of a step's only mini-batch, with the weights they have in the whole."""
    return mini_batch(groups, stage, step, responses=stage.batch.groups * stage.batch.group_size)


class Clock:
    """Seconds of a step's phases."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start
