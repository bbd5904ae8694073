"""From a step's groups to what the policy is fed: sequences, mini-batches, packed micro-batches.

`TrainingBatch` is the same on every rank; each takes its own micro-batches out of it by the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rollout.types import Group
from trainer.advantage import advantages
from trainer.attention import ALONE, Attention, SequenceLayout
from trainer.config import StageConfig
from trainer.packing import pack


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One prompt with one response. prompt, response: int32 [m], [n]; sampled_logprobs: float32 [n], nats."""

    prompt: np.ndarray
    response: np.ndarray
    sampled_logprobs: np.ndarray
    advantage: float
    weight: float
    """Share of each of its response tokens in the mini-batch's loss."""
    fresh: bool = True
    """Sampled by the very weights that score it; False for a recovered one."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer step sees, on all ranks together."""

    sequences: tuple[TokenSequence, ...]

    @property
    def response_tokens(self) -> int:
        return sum(len(sequence.response) for sequence in self.sequences)

    @property
    def fresh_tokens(self) -> int:
        return sum(len(sequence.response) for sequence in self.sequences if sequence.fresh)


@dataclass(slots=True)
class MicroBatch:
    """Packed sequences on one rank, or its share of them. T tokens in all, R of them response tokens.

    `old_logprob_R`, `entropy_R` and `ref_logprob_R` (None without a KL term) are filled by scoring.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    layout: SequenceLayout
    rows_R: Tensor
    """Where the hidden state stands that predicts each response token."""
    labels_R: Tensor
    advantage_R: Tensor
    weight_R: Tensor
    sampled_logprob_R: Tensor
    fresh_R: Tensor
    """Whether `sampled_logprob_R` is of the policy that scores."""
    old_logprob_R: Tensor | None = None
    entropy_R: Tensor | None = None
    """Nats."""
    ref_logprob_R: Tensor | None = None
    indices: tuple[int, ...] = field(default=())
    """Which sequences of the mini-batch these are, in packed order; a sequence's R rows stand together. All of them where
    ranks share them."""
    counts: tuple[int, ...] = field(default=())
    """How many of the R rows are of each of these."""


def mini_batches(groups: Sequence[Group], stage: StageConfig, step: int) -> list[MiniBatch]:
    """Step `step`'s N groups, in order, cut into `stage.batch.mini_batches` equal parts, with advantages and token weights.

    response_mean: weight = 1 / (responses · n) for a response of n tokens (GRPO).
    token_sum: weight = 1 / divisor, a constant of the stage (DAPO's objective here: a sum over tokens).
    Raises ValueError where the groups cannot be cut into equal parts.
    """
    if not groups or len(groups) % stage.batch.mini_batches:
        raise ValueError(f"groups: {len(groups)} cannot be cut into batch.mini_batches {stage.batch.mini_batches} equal parts")
    size = len(groups) // stage.batch.mini_batches
    return [mini_batch(groups[start : start + size], stage, step) for start in range(0, len(groups), size)]


def mini_batch(groups: Sequence[Group], stage: StageConfig, step: int, responses: int | None = None) -> MiniBatch:
    """One mini-batch of step `step`, or with `responses`, the number of responses in the whole, a part of one."""
    responses = responses or sum(len(group.samples) for group in groups)
    divisor = stage.objective.divisor or responses * stage.response_limit
    sequences = []
    for group in groups:
        for sample, advantage in zip(group.samples, advantages(group.rewards, stage.objective), strict=True):
            per_token = stage.objective.loss_aggregation == "token_sum"
            weight = 1 / divisor if per_token else 1 / (responses * len(sample.token_ids))
            fresh = sample.weight_version == step  # the version that scores it
            sequences.append(TokenSequence(group.prompt_token_ids, sample.token_ids, sample.logprobs, advantage, weight, fresh))
    return MiniBatch(tuple(sequences))


def micro_batches(
    batch: MiniBatch,
    *,
    rank: int,
    ranks: int,
    budget: int,
    at_least: int,
    device: torch.device,
    attention: Attention = ALONE,
) -> list[MicroBatch]:
    """This rank's share of `batch`, packed. budget: tokens of a micro-batch on one rank; ranks that share micro-batches
    (attention.group) have so many times as many in one.

    Every rank gets the same number of micro-batches; where sequences run out, one of prompt tokens that take no part.
    """
    together = attention.group.size if attention.group else 1
    lengths = [len(sequence) for sequence in batch.sequences]
    plan = pack(lengths, ranks=ranks // together, budget=budget * together, at_least=at_least)
    return [
        collate([batch.sequences[index] for index in indices], device, attention, tuple(indices))
        for indices in plan[rank // together]
    ]


def collate(
    sequences: Sequence[TokenSequence],
    device: torch.device,
    attention: Attention = ALONE,
    indices: tuple[int, ...] = (),
) -> MicroBatch:
    """Sequences end to end; positions restart in each. The hidden state at position p predicts the token at p + 1.

    With attention.group, this rank's share of the tokens, filled up to a multiple of the ranks by tokens that take no part.
    """
    group = attention.group
    fill = -sum(len(sequence) for sequence in sequences) % (group.size if group else 1)
    if fill or not sequences:
        sequences = [*sequences, _no_part(fill or (group.size if group else 1))]
    starts = np.cumsum([0] + [len(sequence) for sequence in sequences])
    rows = [start + len(s.prompt) - 1 + np.arange(len(s.response)) for start, s in zip(starts[:-1], sequences, strict=True)]
    counts = [len(sequence.response) for sequence in sequences]
    tokens = group.share(starts[-1]) if group else slice(0, starts[-1])
    rows_R = np.concatenate(rows)
    responses = slice(*np.searchsorted(rows_R, (tokens.start, tokens.stop)))  # rows_R rises
    here = np.diff(np.clip(np.cumsum([0, *counts]), responses.start, responses.stop))

    def tensor(parts: list[np.ndarray], dtype: torch.dtype, share: slice = responses) -> Tensor:
        return torch.as_tensor(np.concatenate(parts)[share]).to(device=device, dtype=dtype)

    return MicroBatch(
        input_ids_T=tensor([part for s in sequences for part in (s.prompt, s.response)], torch.long, tokens),
        position_ids_T=tensor([np.arange(len(sequence)) for sequence in sequences], torch.long, tokens),
        layout=SequenceLayout.of([len(sequence) for sequence in sequences], device, attention),
        rows_R=tensor([rows_R - tokens.start], torch.long),
        labels_R=tensor([sequence.response for sequence in sequences], torch.long),
        advantage_R=tensor([np.repeat([sequence.advantage for sequence in sequences], counts)], torch.float32),
        weight_R=tensor([np.repeat([sequence.weight for sequence in sequences], counts)], torch.float32),
        sampled_logprob_R=tensor([sequence.sampled_logprobs for sequence in sequences], torch.float32),
        fresh_R=tensor([np.repeat([sequence.fresh for sequence in sequences], counts)], torch.bool),
        indices=indices,
        counts=tuple(here[: len(indices)].tolist()),
    )


def _no_part(tokens: int) -> TokenSequence:
    """A sequence of nothing but prompt."""
    nothing = np.zeros(0, dtype=np.float32)
    return TokenSequence(np.zeros(tokens, dtype=np.int32), nothing.astype(np.int32), nothing, 0.0, 0.0)
