"""The tensors of a case, and what is right for them in fp64.

Logits have a standard deviation of 3, and in half of the rows the label's own logit is far above the rest: a policy that samples
from itself mostly meets tokens it is sure of. The temperature is 1, which all peers can do. Old log-probabilities are set such
that the ratios are 0.5, 1 and 1.6: far enough from the clips that rounding never moves a token across one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from kernels import reference

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
RATIOS = (0.5, 1.0, 1.6)
SURE = 22.0
SEQUENCE = 1024
"""Tokens of one sequence, which share an advantage, as peers that take [B, L] want it."""
CHUNK_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}


@dataclass(frozen=True)
class Inputs:
    """All that the operations take. Empty tensors where the operation has no such input."""

    case: Case
    device: torch.device
    labels_T: Tensor
    logits_TV: Tensor
    hidden_TD: Tensor
    weight_VD: Tensor
    d_logprob_T: Tensor
    d_entropy_T: Tensor
    logprob_T: Tensor
    old_logprob_T: Tensor
    advantage_T: Tensor
    weight_T: Tensor
    entropy_weight: float
    token_ids: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def sequences(self) -> int:
        return max(1, self.case.tokens // SEQUENCE)

    @functools.cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken by."""
        if self.case.is_linear:
            return self.hidden_TD, self.weight_VD
        return (self.logits_TV,) if self.case.takes_logits else (self.logprob_T,)

    def logits_of(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of the logits, computed and returned in dtype."""
        if self.case.is_linear:
            return self.hidden_TD[rows].to(dtype) @ self.weight_VD.to(dtype).T
        return self.logits_TV[rows].to(dtype)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs, equal for equal (case, device, seed)."""
    case = case.workload()
    random = torch.Generator(device).manual_seed(seed)
    tokens, vocabulary, dtype = case.tokens, case.vocabulary, case.torch_dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=random)

    labels_T = torch.randint(max(vocabulary, 1), (tokens,), device=device, generator=random)
    sure_T = torch.arange(tokens, device=device) % 2 == 0
    empty = torch.empty(0, device=device)
    logits_TV = hidden_TD = weight_VD = empty
    if case.takes_logits:
        logits_TV = normal(tokens, vocabulary, scale=3.0, dtype=dtype)
        logits_TV[sure_T, labels_T[sure_T]] = SURE
    elif case.is_linear:
        weight_VD = normal(vocabulary, case.hidden, scale=3 / math.sqrt(case.hidden), dtype=dtype)
        hidden_TD = normal(tokens, case.hidden)
        hidden_TD[sure_T] += SURE / 9 * weight_VD[labels_T[sure_T]].float()
        hidden_TD = hidden_TD.to(dtype)
    sequences = max(1, tokens // SEQUENCE)
    advantage_T = normal(sequences).repeat_interleave(-(-tokens // sequences))[:tokens].contiguous()
    partial = Inputs(
        case=case,
        device=device,
        labels_T=labels_T,
        logits_TV=logits_TV,
        hidden_TD=hidden_TD,
        weight_VD=weight_VD,
        d_logprob_T=normal(tokens),
        d_entropy_T=normal(tokens),
        logprob_T=-normal(tokens).abs(),
        old_logprob_T=empty,
        advantage_T=advantage_T,
        weight_T=torch.full((tokens,), 1 / tokens, device=device),
        entropy_weight=1e-2 / tokens,
        token_ids=_token_ids(tokens, seed) if case.operation == "repetition" else {},
    )
    logprob_T = _logprobs(partial) if "policy" in case.operation and vocabulary else partial.logprob_T
    log_ratio_T = torch.tensor(RATIOS, device=device).log()[torch.randint(3, (tokens,), device=device, generator=random)]
    return Inputs(**{**_fields(partial), "old_logprob_T": logprob_T - log_ratio_T})


def row_chunks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    step = max(1, CHUNK_BYTES.get(device.type, 1 << 27) // (8 * max(vocabulary, 1)))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _logprobs(inputs: Inputs) -> Tensor:
    """fp32; exact enough to place the ratios."""
    parts = [
        reference.logprob_entropy(inputs.logits_of(rows, torch.float32), inputs.labels_T[rows])[0]
        for rows in row_chunks(inputs.case.tokens, inputs.case.vocabulary, inputs.device)
    ]
    return torch.cat(parts)


def _fields(inputs: Inputs) -> dict[str, object]:
    return {name: getattr(inputs, name) for name in Inputs.__dataclass_fields__}


def _token_ids(tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Kinds of output, easy and hard for a detector: no loop, one token only, short and long periods, loops broken off, and
    Fibonacci's word, which is full of nearly periodic stretches."""
    rng = np.random.default_rng(seed)
    ordinary = rng.integers(0, 152_064, tokens)
    paragraph = rng.integers(0, 152_064, tokens // 7)
    broken = np.tile(rng.integers(0, 50, 211), tokens // 211 + 1)[:tokens].copy()
    broken[:: tokens // 40] += 1
    word, previous = [0], [0, 1]
    while len(previous) < tokens:
        word, previous = previous, previous + word
    kinds = {
        "no repeat": ordinary,
        "one token": np.zeros(tokens),
        "two tokens at random": rng.integers(0, 2, tokens),
        "a period of 3": np.tile([5, 6, 7], tokens // 3 + 1)[:tokens],
        "a paragraph again and again": np.tile(paragraph, 8)[:tokens],
        "loops broken off": broken,
        "Fibonacci's word": np.array(previous[:tokens]),
    }
    return {name: np.ascontiguousarray(ids, dtype=np.int64) for name, ids in kinds.items()}
