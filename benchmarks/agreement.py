"""How close an exported model is to the one it came from, as pure functions of what both said about the same prompts.

With d = log-probability by the export - log-probability by the base, of each token of the base's own sampled outputs, both fed
the same tokens (teacher forcing), at temperature 1, in nats:

    logit error     mean, 99.9th percentile and maximum of |d|
    k3              mean of exp(d) - 1 - d, the k3 estimate of KL(base ‖ export), as the tokens are the base's; its plain
                    estimate is the mean of -d (J. Schulman, "Approximating KL divergence")

Greedy outputs, the likeliest token each time:

    identical       share of prompts whose two outputs are the same to the last token
    prefix          tokens until the two first differ, mean over prompts; its share of the base's tokens over all prompts
    top-1           share of the base's greedy tokens that are the export's likeliest too, where it is fed the base's output up to
                    there; in bfloat16 several tokens are often the likeliest alike, and each of them counts

Accuracy is paired: each question's share of right outputs by the one and by the other; the difference is the mean over questions
of theirs, and its standard error that of a mean of n differences, with n - 1 in the variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.reference import k3
from rollout.vllm.engine import Scores

PERCENTILE = 0.999


def logit_error(base: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, float]:
    """base, other: log-probabilities of the same tokens, an array an output, in the same order. Raises ValueError where they do
    not correspond, or where there is no token."""
    if [len(each) for each in base] != [len(each) for each in other]:
        raise ValueError("the two score outputs of different lengths")
    if not sum(map(len, base)):
        raise ValueError("no tokens were scored")
    d = np.concatenate([*other]).astype(np.float64) - np.concatenate([*base])
    gap = np.abs(d)
    return {
        "tokens": len(d),
        "mean": float(gap.mean()),
        "p999": float(np.quantile(gap, PERCENTILE, method="inverted_cdf")),
        "max": float(gap.max()),
        "k3": float(k3(torch.from_numpy(d)).mean()),
        "kl": float(-d.mean()),
    }


def identical_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens until the two first differ; the shorter one's length where they do not."""
    both = min(len(first), len(second))
    differ = np.flatnonzero(first[:both] != second[:both])
    return int(differ[0]) if len(differ) else both


def greedy_agreement(base: Sequence[np.ndarray], other: Sequence[np.ndarray], scores: Sequence[Scores]) -> dict[str, float]:
    """base, other: greedy outputs' token ids, by prompt. scores: by the other, of the base's tokens."""
    prefixes = [identical_prefix(*pair) for pair in zip(base, other, strict=True)]
    best = [each.logprobs >= each.best for each in scores]
    if [len(each) for each in best] != [len(each) for each in base]:
        raise ValueError("the scores are not of the base's greedy outputs")
    tokens = sum(map(len, base))
    same = sum(np.array_equal(*pair) for pair in zip(base, other, strict=True))
    return {
        "prompts": len(base),
        "identical": same / len(base),
        "mean_prefix": sum(prefixes) / len(base),
        "mean_length": tokens / len(base),
        "prefix_share": sum(prefixes) / tokens,
        "top_1": float(np.concatenate(best).mean()),
    }


def paired_accuracy(base: Mapping[int, float], other: Mapping[int, float]) -> dict[str, float | int | None]:
    """base, other: question → share of its outputs that are right; a question that one of them lacks (nothing of it could be
    judged) is left out. standard_error: None with fewer than two questions."""
    questions = sorted(base.keys() & other.keys())
    if not questions:
        raise ValueError("no question was judged for both")
    differences = np.asarray([other[each] - base[each] for each in questions])
    n = len(questions)
    return {
        "questions": n,
        "base": sum(base[each] for each in questions) / n,
        "export": sum(other[each] for each in questions) / n,
        "difference": float(differences.mean()),
        "standard_error": float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else None,
        "changed": int((differences != 0).sum()),
    }


def weight_error(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    """pairs: (name, the base's weight, the export's). By kind of layer (q_proj, down_proj, …, over all layers):
    ‖export - base‖ / ‖base‖, Frobenius, and the worst single tensor."""
    sums: dict[str, list[float]] = {}
    worst: dict[str, tuple[float, str]] = {}
    for name, base, other in pairs:
        error, norm = _squares(other.float() - base.float()), _squares(base.float())
        kind = kind_of(name)
        total = sums.setdefault(kind, [0, 0.0, 0.0])
        sums[kind] = [total[0] + 1, total[1] + error, total[2] + norm]
        worst[kind] = max(worst.get(kind, (-1.0, "")), (_ratio(error, norm), name))
    return {
        kind: {"tensors": count, "relative_error": _ratio(error, norm), "worst": worst[kind][0], "worst_name": worst[kind][1]}
        for kind, (count, error, norm) in sorted(sums.items())
    }


def kind_of(name: str) -> str:
    """'q_proj' of 'model.layers.3.self_attn.q_proj.weight', 'q_proj.bias' of its bias, 'embed_tokens' of
    'model.embed_tokens.weight'."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:] if parts[-1] == "bias" else parts[-1:])


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _ratio(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else math.sqrt(error)
