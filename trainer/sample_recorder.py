"""Which groups of a step are kept for a reader, and how they come into its file (`trainer.samples`).

Kept are `samples.groups` of those that were sampled or trained on, of each fate in turn. So a reader sees all that can become of
a group: in a dynamic stage with 8 kept usually two each that were trained on, uniform, recovered, and left waiting. Chance has no
part in it, and nothing that the run learns from depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from rollout.recovery import kept
from rollout.types import Group, Prompt
from trainer.advantage import advantages
from trainer.config import RunConfig, StageConfig
from trainer.samples import FATES, FOLDER, KeptGroup, KeptSample, drop_after, write_step
from trainer.token_values import gathered, key_of

if TYPE_CHECKING:  # they bring torch with them
    from rollout.ranks import Ranks
    from rollout.reward.tokens import Reader
    from rollout.sampler import Collected
    from trainer.actor import ScoredMiniBatch

SCORED = ("trained", "recovered")


class SampleRecorder:
    """Of one run. note: told once when the disk begins to refuse, which ends nothing."""

    def __init__(self, config: RunConfig, ranks: Ranks, reader: Reader, note: Callable[[str], None]) -> None:
        self._config, self._settings, self._ranks, self._reader, self._note = config, config.samples, ranks, reader, note
        self._refused = False

    def resume(self, step: int) -> None:
        """The run continues after `step`. On rank 0."""
        self._attempt(f"of steps after {step} could not be removed", lambda: drop_after(self._config.run, step))

    def keep(self, step: int, collected: Collected, waiting: Sequence[Group], scored: Sequence[ScoredMiniBatch]) -> None:
        """Writes the file of step number `step`, which has just trained on what was scored. waiting: the recovery buffer that it
        left; on rank 0. A collective."""
        if not self._settings.groups or step % self._settings.every:
            return
        config, index = self._config, self._config.stage_of(step - 1)
        stage = config.stages[index]
        fated = chosen(fates(collected.batch, collected.sampled, waiting, step, stage.batch.dynamic), self._settings.groups)
        entropies = self._entropies(fated, scored) if self._settings.tokens else None
        if self._ranks.first:
            groups = (kept_group(group, fate, step, index, stage, self._reader, entropies) for group, fate in fated)
            self._attempt(f"of step {step} could not be written", lambda: write_step(config.run, step, groups))

    def _entropies(self, fated: Sequence[tuple[Group, str]], scored: Sequence[ScoredMiniBatch]) -> Mapping[bytes, np.ndarray]:
        """Of the scored sequences among these groups; what other ranks than the first pass is ignored."""
        wanted = {
            key_of(group.prompt_token_ids, sample.token_ids)
            for group, fate in fated
            if fate in SCORED
            for sample in group.samples
        }
        wanted = self._ranks.broadcast(wanted)
        together = self._config.parallel.sequence_ranks
        return gathered(self._ranks, together, scored, lambda micro: micro.entropy_R, wanted)

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
            self._refused = False
        except OSError as error:
            if not self._refused:
                self._note(f"samples {what} in {self._config.run / FOLDER} ({error.strerror}); the run goes on")
            self._refused = True


def fates(
    batch: Sequence[Group], sampled: Sequence[Group], waiting: Sequence[Group], step: int, dynamic: bool
) -> list[tuple[Group, str]]:
    """Each group that was trained on or sampled in step number `step`, with its fate: the batch first, then the others as they
    were drawn. A group is the same object in all three."""
    trained, buffered = {id(group) for group in batch}, {id(group) for group in waiting}

    def fate(group: Group) -> str:
        if id(group) in trained:
            return "trained" if group.drawn_step + 1 == step else "recovered"
        if not group.judged:
            return "failed"
        if id(group) in buffered:
            return "waiting"
        return "expired" if kept(group, dynamic) else "uniform"

    others = [group for group in sampled if id(group) not in trained]
    return [(group, fate(group)) for group in (*batch, *others)]


def chosen(fated: Sequence[tuple[Group, str]], count: int) -> list[tuple[Group, str]]:
    """At most `count` of these, in their order: the first of each fate in the order of FATES, then the second of each, and so on
    while there are places."""
    queues = [[place for place, (_, fate) in enumerate(fated) if fate == each] for each in FATES]
    turns = [place for turn in zip_longest(*queues) for place in turn if place is not None]
    return [fated[place] for place in sorted(turns[:count])]


def kept_group(
    group: Group,
    fate: str,
    step: int,
    index: int,
    stage: StageConfig,
    reader: Reader,
    entropies: Mapping[bytes, np.ndarray] | None,
) -> KeptGroup:
    """index: of the stage. entropies: of scored sequences by `key_of`; None: no token detail."""
    scored = fate in SCORED
    trained = advantages(group.rewards, stage.objective) if scored else [None] * len(group.samples)
    samples = []
    for sample, verdict, advantage in zip(group.samples, group.verdicts, trained, strict=True):
        reading = reader.read(sample.token_ids)
        ends = reading.character_ends() if entropies is not None else None
        detailed = ends is not None
        samples.append(
            KeptSample(
                text=reading.text,
                right=verdict.right,
                reason=verdict.reason,
                detail=verdict.detail,
                mixed=verdict.mixed,
                finish=sample.finish_reason,
                version=sample.weight_version,
                tokens=len(sample.token_ids),
                advantage=advantage,
                ends=ends,
                logprob=rounded(sample.logprobs) if detailed else None,
                entropy=rounded(entropies[key_of(group.prompt_token_ids, sample.token_ids)]) if detailed and scored else None,
            )
        )
    prompt = Prompt(group.prompt.id, group.prompt.question, group.prompt.answer, group.prompt.source)
    return KeptGroup(step, index, stage.name, prompt, fate, group.drawn_step + 1, tuple(samples))


def rounded(values: np.ndarray) -> list[float | None]:
    """To 3 decimals; None for a number that is not finite, which JSON does not have."""
    numbers = (np.round(values.astype(np.float64), 3) + 0.0).tolist()  # no -0.0
    return numbers if np.isfinite(values).all() else [number if np.isfinite(number) else None for number in numbers]
