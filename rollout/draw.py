"""What a step asks of the sampler, and why it may not get it."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.engine import Decoding
from rollout.errors import InputError
from rollout.flight import Flight
from rollout.types import Group


class SamplingStopped(Exception):
    """The run is to stop, so the sampling was abandoned; the ledger and the cursor are somewhere within the step."""


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
    max_age: int | None = 1
    """Steps for which a surplus group may wait for a place; None: as long as it takes."""
    max_unjudged_rounds: int | None = None
    """After so many rounds in a row, over the steps, without any verdict of the judge that was asked, the run is given up."""
    abort_surplus: bool = False
    """Stop decoding as soon as N groups are legitimate: see `trainer.config.BatchConfig`."""


def why_stalled(draw: Draw, flight: Flight) -> str:
    sampled = [group for each in flight.outcome() for group in each.groups]
    judged = [group for group in sampled if group.judged]
    easy = sum(group.right == len(group.verdicts) for group in judged)
    hard = sum(group.right == 0 for group in judged)
    failed = len(sampled) - len(judged)
    unjudged = f", {failed} that the judge left without a verdict" if failed else ""
    return (
        f"step {draw.step + 1}: {flight.finished()} of {draw.groups} groups after {flight.rounds} rounds "
        f"({len(sampled)} groups sampled: {easy} all right, {hard} all wrong{unjudged}); "
        "raise batch.max_rounds, or change the prompts: too easy or too hard for this policy"
        + (", or see to the judge" if failed else "")
    )


def fits(group: Group, draw: Draw) -> bool:
    """Whether a group of an earlier step could have been drawn under this step's settings."""
    return (
        len(group.samples) == draw.group_size
        and len(group.prompt_token_ids) <= draw.max_prompt_tokens
        and all(len(sample.token_ids) <= draw.decoding.max_new_tokens for sample in group.samples)
    )
