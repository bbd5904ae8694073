"""The training loop: sample, score, update, sync, measure, keep; stage after stage, from where the run folder left off.

Every method of `TrainingLoop` is called by all ranks together. What must survive a restart lies on rank 0: the sampler's ledger
and recovery buffer, the prompt sources' cursors, and the number of finished steps, which is also the weight version.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

from rollout.engine import Decoding
from rollout.prompts import PromptSource
from rollout.ranks import Ranks
from rollout.sampler import Collected, Draw, SamplerState
from trainer.batch import mini_batches
from trainer.checkpoint import Checkpoints, RunState
from trainer.config import RunConfig, StageConfig
from trainer.config_file import dump_config
from trainer.evaluation import evaluate
from trainer.metrics import MetricsWriter
from trainer.preflight import Inputs, source_key
from trainer.setup import Parts
from trainer.step_row import step_row


class TrainingLoop:
    """inputs: rank 0's prompts, None elsewhere. console: the real one on rank 0."""

    def __init__(self, config: RunConfig, inputs: Inputs | None, parts: Parts, ranks: Ranks, console: Any) -> None:
        self.config, self.inputs, self.parts, self.ranks, self.console = config, inputs, parts, ranks, console
        self.checkpoints = Checkpoints(config.run, ranks, config.checkpoint.keep, console.note)
        self.metrics: MetricsWriter | None = None
        self.checkpoint_seconds = 0.0
        """Of the last checkpoint; it is written after its step's row, so the next row reports it."""

    def run(self) -> None:
        """To the end of the last stage."""
        step = self.resume()
        self.push_weights(step)
        if step == 0:
            self.evaluate(step)
        while step < self.config.total_steps:
            step = self.train_step(step)
            if self.due(step, self.config.evaluation.every):
                self.evaluate(step)
            if self.due(step, self.config.checkpoint.every):
                self.save(step)
        if self.metrics is not None:
            self.metrics.close()

    def train_step(self, step: int) -> int:
        """One step of the recipe. Returns how many steps are finished now."""
        stage = self.config.stages[self.config.stage_of(step)]
        clock = Clock()
        collected = self.parts.sampler.collect(self.draw(step, stage), self.source(stage))
        clock.lap("sample")
        batches = mini_batches(collected.batch, stage, step)
        sequences = sum(len(batch.sequences) for batch in batches) // self.ranks.size
        with self.console.phase("scoring", sequences, "sequences") as bar:
            scored = self.parts.actor.score(batches, stage, bar.advance)
        clock.lap("score")
        with self.console.phase("update", sequences, "sequences") as bar:
            updates = [self.parts.actor.update(batch, stage, bar.advance) for batch in scored]
        clock.lap("update")
        self.push_weights(step + 1)
        clock.lap("sync")
        if self.ranks.first:
            state = self.parts.sampler.state
            row = step_row(collected, scored, updates, state.ledger, len(state.buffer), stage)
            self.write(step + 1, stage, row | self.clocked(clock, collected, batches))
        return step + 1

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
            decoding=Decoding(stage.response_limit, stage.sampling.temperature),
        )

    def source(self, stage: StageConfig) -> PromptSource | None:
        return self.inputs.sources[source_key(stage.data.train)] if self.inputs is not None else None

    def push_weights(self, version: int) -> None:
        """Engines sample from version `version` from here on."""
        with self.console.phase("sync", None, "tensors") as bar:
            self.parts.engine.load(version, _counted(self.parts.actor.policy.whole_weights(), bar))

    def due(self, step: int, every: int | None) -> bool:
        return step == self.config.total_steps or (every is not None and step % every == 0)

    def evaluate(self, step: int) -> None:
        sets = self.inputs.evaluation if self.inputs is not None else {}
        for row in evaluate(self.parts.sampler, sets, self.config, self.ranks, step):
            self.metrics.write(row)
            self.console.evaluation(row)

    def save(self, step: int) -> None:
        start = time.perf_counter()
        with self.console.phase("checkpoint", None, "files"):
            self.checkpoints.save(self.parts.actor, self.state(step))
        self.checkpoint_seconds = time.perf_counter() - start

    def state(self, step: int) -> RunState:
        sampler, sources = self.parts.sampler.state, self.inputs.sources if self.inputs is not None else {}
        return RunState(step, sampler.ledger, sampler.buffer, {key: source.state() for key, source in sources.items()})

    def resume(self) -> int:
        """Restores the newest complete checkpoint, if any, and opens the metrics where it left off. Returns finished steps.

        Only then is the configuration written: until here, what the folder holds may prove not to go with it.
        """
        state = self.checkpoints.resume(self.parts.actor)
        if self.ranks.first:
            self.parts.sampler.state = SamplerState(state.ledger, state.buffer)
            for key, cursor in state.sources.items():
                if key in self.inputs.sources:
                    self.inputs.sources[key].load(cursor)
            self.metrics = MetricsWriter(self.config.run, resume_after=state.step or None)
            dump_config(self.config, self.config.run / "config.yaml")
            if state.step:
                self.console.resumed(state.step)
        return state.step

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
        self.metrics.write(row)
        self.console.step(row)

    def clocked(self, clock: Clock, collected: Collected, batches: list) -> dict[str, float]:
        """Seconds, rates and memory of a step, on this rank."""
        seconds = clock.seconds | collected.seconds
        sampled = sum(len(sample.token_ids) for group in collected.sampled for sample in group.samples)
        trained = sum(len(sequence) for batch in batches for sequence in batch.sequences)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        row = {f"time/{phase}": value for phase, value in seconds.items()} | {"time/step": clock.total()}
        if self.checkpoint_seconds:
            row["time/checkpoint"], self.checkpoint_seconds = self.checkpoint_seconds, 0.0
        return row | {
            "rate/sample": sampled / seconds["sample"],
            "rate/update": trained / (seconds["score"] + seconds["update"]),
            "memory/rss_gib": peak,
        }


class Clock:
    """Seconds of a step's phases."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now

    def total(self) -> float:
        return time.perf_counter() - self._start


def _counted(weights: Any, bar: Any) -> Any:
    for item in weights:
        yield item
        bar.advance(1)
