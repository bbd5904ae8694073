"""The policy's side of a weight push's probe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from kernels.linear_logprob_entropy import linear_logprob_entropy
from rollout.weights.sync import Score
from trainer.attention import Attention
from trainer.batch import TokenSequence, collate
from trainer.policy import Policy


def policy_scorer(policy: Policy, device: torch.device) -> Score:
    """`rollout.weights.sync.Score` of a sharded policy."""

    @torch.no_grad()
    def score(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> list[np.ndarray]:
        sequences = [
            TokenSequence(prompt, response, np.zeros(len(response), np.float32), advantage=0.0, weight=0.0)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        batch = collate(sequences, device, Attention(policy.attention.kernel))
        logprob_R, _ = policy(batch, lambda hidden, weight: linear_logprob_entropy(hidden, weight, batch.labels_R))
        if isinstance(policy, FSDPModule):
            policy.reshard()  # else the root stays whole, beside an engine that samples
        ends = np.cumsum([len(response) for response in responses])
        return np.split(logprob_R.float().cpu().numpy(), ends[:-1])

    return score
