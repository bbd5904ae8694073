"""The definitions of every operation in plain PyTorch, in any dtype up to fp64. Kernels, tests and benchmarks hold to these.

T tokens, V vocabulary, D hidden. Logits are divided by the sampling temperature before anything else, so that a
log-probability here is that of the distribution which was sampled from.

    log p_y  = z_y - logsumexp(z)            = -softplus(logsumexp_{j != y} z_j - z_y)
    H        = -sum_j p_j log p_j            (0 · log 0 = 0)
    d log p_y / d z_j = [j = y] - p_j
    d H / d z_j       = -p_j (log p_j + H)

The second form of log p_y keeps its relative accuracy where p_y is near 1 (the first rounds to exactly 0 there), and
where z_y = -inf it is -inf, not NaN.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
"""Label of a row that takes no part: its log-probability, entropy and gradient are 0."""


def logprob_entropy(logits_TV: Tensor, labels_T: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, differentiable.

    logits_TV: [T, V] floating; -inf is allowed, also as a whole run of columns, as long as one logit is finite.
    labels_T: [T] integer in [0, V), or IGNORE. temperature: a positive scalar or [T].
    Returns (logprob_T in nats, at most 0; entropy_T in nats), in fp32, or fp64 where the logits are fp64.
    Raises ValueError for a label outside the vocabulary. This reference synchronises with the host to do so.
    """
    vocabulary = logits_TV.shape[1]
    ignored_T = labels_T == IGNORE
    if bool(((labels_T < 0) & ~ignored_T).any()) or bool((labels_T >= vocabulary).any()):
        raise ValueError(f"labels_T: a label lies outside [0, {vocabulary}) and is not {IGNORE}")
    z_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z_TV.dtype).reshape(-1, 1)
    z_TV = z_TV / temperature
    label_T1 = labels_T.masked_fill(ignored_T, 0).long().unsqueeze(1)
    z_label_T = z_TV.gather(1, label_T1).squeeze(1)
    others_T = z_TV.scatter(1, label_T1, float("-inf")).logsumexp(1)
    logprob_T = -functional.softplus(others_T - z_label_T, threshold=50.0)
    logprob_T = torch.where(others_T == float("-inf"), torch.zeros_like(logprob_T), logprob_T)
    log_p_TV = z_TV.log_softmax(1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(log_p_TV == float("-inf"), 0)).sum(1)
    zero = torch.zeros((), dtype=z_TV.dtype, device=z_TV.device)
    return torch.where(ignored_T, zero, logprob_T), torch.where(ignored_T, zero, entropy_T)


class ClippedPolicyLoss(NamedTuple):
    """What `clipped_policy_loss` returns. All tensors are scalars but the last.

    Counts, sums and extremes are over the tokens with weight ≠ 0.
    """

    loss: Tensor
    clipped_low: Tensor
    """Tokens whose ratio fell below 1 - clip_low with a negative advantage: the clip took their gradient away."""
    clipped_high: Tensor
    """Tokens whose ratio rose above 1 + clip_high with a positive advantage."""
    kl_sum: Tensor
    """Sum of k3 for KL(old ‖ new), an estimate of how far the policy has moved since it was scored."""
    ref_kl_sum: Tensor
    """Sum of k3 for KL(new ‖ reference); 0 without a reference."""
    ratio_max: Tensor
    """-inf where no token takes part, so that the largest of several parts is the largest of the whole; ratio_min: inf."""
    ratio_min: Tensor
    d_logprob_T: Tensor
    """d loss / d logprob_T."""


def clipped_policy_loss(
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    advantage_T: Tensor,
    weight_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logprob_T: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> ClippedPolicyLoss:
    """The clipped-ratio policy loss (PPO, arXiv 1707.06347; clip_low ≠ clip_high as in DAPO, arXiv 2503.14476).

        r_t  = exp(logprob_t - old_logprob_t)
        loss = sum_t weight_t · ( max(-r_t A_t, -clip(r_t, 1 - clip_low, 1 + clip_high) A_t) + kl_coefficient · k3_t )

    weight_T is 0 for a token that takes no part and otherwise its share of the sum: 1 / (responses · length of its response)
    is GRPO's mean over responses, 1 / constant is DAPO's sum over tokens. k3 is the estimate of KL(policy ‖ reference).
    All inputs [T] floating; computed in fp32, or fp64 where logprob_T is fp64. Where both arms are equal (ratio inside
    the clip) the gradient is the unclipped arm's. A token whose advantage is 0 has a loss and a gradient of 0 whatever its
    ratio is, also where the ratio overflows (0 · inf counts as 0); a NaN stays one.
    """
    dtype = torch.promote_types(logprob_T.dtype, torch.float32)
    logprob_T, old_logprob_T, advantage_T, weight_T = (
        tensor.to(dtype) for tensor in (logprob_T, old_logprob_T, advantage_T, weight_T)
    )
    active_T = weight_T != 0
    log_ratio_T = torch.where(active_T, logprob_T - old_logprob_T, 0)
    ratio_T = log_ratio_T.exp()
    free_T = -torch.where((advantage_T == 0) & (ratio_T == math.inf), 0, ratio_T) * advantage_T
    held_T = -ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantage_T
    low_T = active_T & (advantage_T < 0) & (ratio_T < 1 - clip_low)
    high_T = active_T & (advantage_T > 0) & (ratio_T > 1 + clip_high)
    loss_T = torch.maximum(free_T, held_T)
    slope_T = torch.where(low_T | high_T, 0, free_T)
    ref_kl_T = torch.zeros_like(loss_T)
    if ref_logprob_T is not None:
        gap_T = torch.where(active_T, ref_logprob_T.to(dtype) - logprob_T, 0)
        ref_kl_T = k3(gap_T)
        loss_T = loss_T + kl_coefficient * ref_kl_T
        slope_T = slope_T - kl_coefficient * torch.expm1(gap_T)
    infinity = torch.full((1,), math.inf, dtype=dtype, device=logprob_T.device)
    return ClippedPolicyLoss(
        loss=torch.where(active_T, loss_T * weight_T, 0).sum(),
        clipped_low=low_T.sum(),
        clipped_high=high_T.sum(),
        kl_sum=torch.where(active_T, k3(log_ratio_T), 0).sum(),
        ref_kl_sum=torch.where(active_T, ref_kl_T, 0).sum(),
        ratio_max=torch.cat((torch.where(active_T, ratio_T, -infinity), -infinity)).max(),
        ratio_min=torch.cat((torch.where(active_T, ratio_T, infinity), infinity)).min(),
        d_logprob_T=torch.where(active_T, slope_T * weight_T, 0),
    )


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x with x = log(q/p), for samples of p: the k3 estimate of KL(p ‖ q).

    Source: J. Schulman, "Approximating KL divergence". Through expm1, so that small x does not cancel; never negative.
    """
    return (torch.expm1(log_ratio) - log_ratio).clamp_min(0)


def entropy_regularizer(mean_entropy: Tensor, target: float, coefficient: float) -> Tensor:
    """Targeted Entropy Regularization (arXiv 2506.18330): coefficient · |mean entropy - target|, to be added to the loss.

    The mean is over ALL response tokens of the mini-batch, on all ranks and in all micro-batches: the absolute value of a
    mean is not the mean of absolute values. Its gradient is coefficient · sign(mean - target) · d mean.
    """
    return coefficient * (mean_entropy - target).abs()
