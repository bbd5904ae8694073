"""What of a step's prompts has come back, and what follows from it before all has: pure decisions, on rank 0.

Algorithm 1 samples in rounds, and whether another round follows is known when the last output of this one is judged. Often it
is certain earlier: if the groups in hand and all that may still turn out legitimate are fewer than N, another round follows
whatever the stragglers say, and its prompts may be drawn now. Likewise a legitimate group with fewer than N possible groups
before it in the order of drawing is certain to be trained on, and may be scored now. Both change when something is done, never
what is decided. A sample that the judge left without a verdict takes its group out at once, whatever its other outputs are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rollout.lane import Judged
from rollout.recovery import kept
from rollout.reward.correctness import needs_judge
from rollout.types import Group, Prompt, Sample, Verdict

BY_JUDGE = ("right", "wrong", "process")
"""Reasons of a verdict that a judge gave; the others come from the filter before it."""


@dataclass(slots=True)
class Drawn:
    """A prompt with what has come of its G outputs so far."""

    prompt: Prompt
    prompt_token_ids: np.ndarray
    outputs: list[tuple[Sample, Verdict] | None]
    """Empty for a prompt that is too long to be sampled."""
    missing: int

    @property
    def failed(self) -> bool:
        return not self.outputs

    @property
    def complete(self) -> bool:
        return bool(self.outputs) and self.missing == 0

    @property
    def open(self) -> bool:
        """May still become a group that is kept: not all has come back, and what has was judged."""
        return self.missing > 0 and all(output is None or output[1].judged for output in self.outputs)


@dataclass(slots=True)
class Round:
    """One round's outcome, in the order its prompts were drawn. groups: complete, judged or not."""

    groups: list[Group]
    drawn: int
    aborted: int


@dataclass(frozen=True, slots=True)
class Silence:
    """How many rounds in a row, over the steps, the judge was asked and gave no verdict at all; why: of the last of them."""

    rounds: int = 0
    why: str = ""


@dataclass(slots=True)
class _Judging:
    """What came of one round's samples for the judge: with its verdict, and without."""

    verdicts: int = 0
    unjudged: int = 0
    why: str = ""


@dataclass(slots=True)
class Flight:
    """One step's. needed: N; recovered: groups that lie before all drawn ones in the batch; silence: before this step."""

    step: int
    group_size: int
    needed: int
    dynamic: bool
    recovered: int = 0
    silence: Silence = Silence()
    drawn: list[Drawn] = field(default_factory=list)
    _rounds: list[int] = field(default_factory=list)
    """Where each round's prompts begin in `drawn`."""
    _judging: list[_Judging] = field(default_factory=list)
    """By round."""
    _groups: dict[int, Group] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(self._rounds)

    @property
    def landed(self) -> bool:
        """Nothing is in flight."""
        return all(each.failed or each.complete for each in self.drawn)

    def draw(self, prompts: Sequence[Prompt], encoded: Sequence[np.ndarray], longest: int | None) -> range:
        """A round begins. Returns the places of its prompts; those of more than `longest` tokens fail at once."""
        first = len(self.drawn)
        self._rounds.append(first)
        self._judging.append(_Judging())
        for prompt, ids in zip(prompts, encoded, strict=True):
            size = self.group_size if longest is None or len(ids) <= longest else 0
            self.drawn.append(Drawn(prompt, ids, [None] * size, size))
        return range(first, len(self.drawn))

    def take(self, judged: Sequence[Judged]) -> None:
        """Raises ValueError for an output that was not asked for, or came twice."""
        for each in judged:
            drawn = self.drawn[each.place]
            if drawn.outputs[each.output] is not None:
                raise ValueError(f"output {each.output} of prompt {drawn.prompt.id} came twice")
            drawn.outputs[each.output] = (each.sample, each.verdict)
            drawn.missing -= 1
            self._note_judging(each.place, drawn.prompt, each.verdict)
            if not drawn.missing:
                self._groups[each.place] = self._group(drawn)

    def finished(self) -> int:
        """Groups that will be in B_c: the recovered, and the complete ones that are kept."""
        return self.recovered + sum(kept(group, self.dynamic) for group in self._groups.values())

    def possible(self) -> int:
        """The most that B_c can still become without another round."""
        return self.finished() + sum(each.open for each in self.drawn)

    def certain(self) -> list[int]:
        """Places of complete groups that will be trained on, whatever the rest becomes."""
        before, places = self.recovered, []
        for place, drawn in enumerate(self.drawn):
            if before >= self.needed:
                break
            found = drawn.complete and kept(self._groups[place], self.dynamic)
            if found:
                places.append(place)
            before += found or drawn.open
        return places

    def silent(self) -> Silence:
        """How things stand with the judge now. A round without a sample for it, or still in flight, changes nothing; a single
        verdict of its ends the silence."""
        silence = self.silence
        for judging, (first, end) in zip(self._judging, self._spans(), strict=True):
            if judging.verdicts:
                silence = Silence()
            elif judging.unjudged and all(each.failed or each.complete for each in self.drawn[first:end]):
                silence = Silence(silence.rounds + 1, judging.why)
        return silence

    def group(self, place: int) -> Group:
        return self._groups[place]

    def outcome(self) -> list[Round]:
        """Every round's complete groups; what is incomplete was aborted."""
        rounds = []
        for first, end in self._spans():
            groups = [self._groups[place] for place in range(first, end) if place in self._groups]
            failed = sum(each.failed for each in self.drawn[first:end])
            rounds.append(Round(groups, end - first, end - first - failed - len(groups)))
        return rounds

    def _spans(self) -> list[tuple[int, int]]:
        """Each round's places."""
        return list(zip(self._rounds, [*self._rounds, len(self.drawn)][1:], strict=True))

    def _note_judging(self, place: int, prompt: Prompt, verdict: Verdict) -> None:
        if not needs_judge(prompt):
            return  # a rule that ran out of time says nothing of the judge
        judging = self._judging[bisect_right(self._rounds, place) - 1]
        if not verdict.judged:
            judging.unjudged += 1
            judging.why = verdict.detail
        elif verdict.reason in BY_JUDGE:
            judging.verdicts += 1

    def _group(self, drawn: Drawn) -> Group:
        outputs = [output for output in drawn.outputs if output is not None]
        return Group(
            prompt=drawn.prompt,
            prompt_token_ids=drawn.prompt_token_ids,
            samples=tuple(sample for sample, _ in outputs),
            verdicts=tuple(verdict for _, verdict in outputs),
            drawn_step=self.step,
        )
