"""The policy in training: scoring, the update of a mini-batch, and what its optimizer does.

There is one actor a rank; all its methods are collectives. Sums and means are over a mini-batch as a whole: all ranks, all
micro-batches. Token weights already carry the objective's normalisation over the mini-batch (`trainer.batch`), so gradients are
summed, never averaged: FSDP2 averages over ranks, hence the loss is multiplied by their number first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import PolicyLoss, PolicyLossInputs, linear_policy_loss
from trainer.batch import MicroBatch, MiniBatch, micro_batches
from trainer.config import ActorConfig, ObjectiveConfig, StageConfig
from trainer.policy import Policy

Advance = Callable[..., None]
"""The console's `advance(n)`, called with the sequences a micro-batch finished."""

SUMS = ("policy_loss", "entropy_sum", "clipped_low", "clipped_high", "kl_sum", "ref_kl_sum")


@dataclass(slots=True)
class ScoredMiniBatch:
    """A mini-batch with this rank's scored micro-batches."""

    whole: MiniBatch
    micro: list[MicroBatch]
    mean_entropy: float
    """Nats per response token, over all ranks, under the weights that scored it."""
    mismatch_sum: float
    """Sum of |sampled - recomputed log-probability| over all ranks' tokens of fresh responses."""
    mismatch_max: float
    """The largest of them."""


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One optimizer step, over all ranks. `losses` as the objective defines them; means are per response token."""

    policy_loss: float
    entropy_loss: float
    """TER's term: coefficient · |mean entropy - target|; 0 without TER."""
    mean_entropy: float
    ref_kl: float
    old_kl: float
    clipped_low: float
    clipped_high: float
    ratio_max: float
    ratio_min: float
    grad_norm: float
    lr: float
    sign_missed: bool
    """TER's assumed sign was wrong and the pass was repeated."""
    skipped: bool
    """The gradient was not finite: no optimizer step was taken."""


class Actor:
    """policy: sharded (`trainer.policy.shard`). reference: sharded and frozen, or None where no stage has a KL term."""

    def __init__(
        self, policy: Policy, config: ActorConfig, *, rank: int, ranks: int, device: torch.device, reference: Policy | None = None
    ) -> None:
        self.policy = policy
        self._reference = reference
        self._rank, self._ranks, self._device = rank, ranks, device
        self.optimizer = torch.optim.AdamW(
            policy.parameters(), lr=config.lr, betas=config.betas, eps=1e-8, weight_decay=config.weight_decay, foreach=False
        )
        self.updates = 0
        """Optimizer steps taken so far; the learning rate's clock."""

    @torch.no_grad()
    def score(
        self, batches: Sequence[MiniBatch], stage: StageConfig, advance: Advance = lambda *_: None
    ) -> list[ScoredMiniBatch]:
        """Old log-probabilities (and the reference's, if there is a KL term) of every mini-batch under the weights of now."""
        return [self._score_one(batch, stage, advance) for batch in batches]

    def update(self, batch: ScoredMiniBatch, stage: StageConfig, advance: Advance = lambda *_: None) -> UpdateResult:
        """One optimizer step on a mini-batch.

        TER's sign is assumed from the scoring pass; where the mean entropy of this very pass lies on the other side of the
        target, the gradient is dropped and formed again with the right sign.
        """
        objective = stage.objective
        assumed = entropy_sign(batch.mean_entropy, objective)
        sums = self._gradient_pass(batch, stage, assumed, advance)
        tokens = batch.whole.response_tokens
        true_sign = entropy_sign(sums["entropy_sum"] / tokens, objective)
        if missed := true_sign != assumed:
            self.optimizer.zero_grad()
            sums = self._gradient_pass(batch, stage, true_sign, lambda *_: None)
        mean_entropy = sums["entropy_sum"] / tokens
        grad_norm, lr, skipped = self._step(stage.actor)
        return UpdateResult(
            policy_loss=sums["policy_loss"],
            entropy_loss=entropy_loss(mean_entropy, objective),
            mean_entropy=mean_entropy,
            ref_kl=sums["ref_kl_sum"] / tokens,
            old_kl=sums["kl_sum"] / tokens,
            clipped_low=sums["clipped_low"] / tokens,
            clipped_high=sums["clipped_high"] / tokens,
            ratio_max=sums["ratio_max"],
            ratio_min=sums["ratio_min"],
            grad_norm=grad_norm,
            lr=lr,
            sign_missed=missed,
            skipped=skipped,
        )  # fmt: skip

    def update_supervised(self, batch: MiniBatch, config: ActorConfig) -> tuple[float, float]:
        """One optimizer step of maximum likelihood, for the warm-up: loss = -sum_t weight_t · logprob_t.

        Returns (loss, gradient norm), over all ranks.
        """
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for micro in self._pack(batch, config):
            logprob_R, _ = self.policy(micro, lambda hidden, weight, m=micro: linear_logprob_entropy(hidden, weight, m.labels_R))
            loss = -(logprob_R * micro.weight_R).sum()
            (loss * self._ranks).backward()
            total += loss.detach()
        grad_norm, _, _ = self._step(config)
        return self._all_reduce(total, dist.ReduceOp.SUM).item(), grad_norm

    def _pack(self, batch: MiniBatch, config: ActorConfig) -> list[MicroBatch]:
        return micro_batches(
            batch, rank=self._rank, ranks=self._ranks, budget=config.tokens_per_micro_batch,
            at_least=config.micro_batches or 1, device=self._device,
        )  # fmt: skip

    def _score_one(self, batch: MiniBatch, stage: StageConfig, advance: Advance) -> ScoredMiniBatch:
        temperature = stage.sampling.temperature
        micro = self._pack(batch, stage.actor)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        largest = torch.zeros((), dtype=torch.float64, device=self._device)
        for part in micro:
            score = lambda hidden, weight, m=part: linear_logprob_entropy(hidden, weight, m.labels_R, temperature)  # noqa: E731
            part.old_logprob_R, entropy_R = self.policy(part, score)
            if stage.objective.kl_coefficient > 0:
                part.ref_logprob_R, _ = self._reference(part, score)
            gap_R = torch.where(part.fresh_R, part.old_logprob_R - part.sampled_logprob_R, 0).abs()
            sums += torch.stack([entropy_R.double().sum(), gap_R.double().sum()])
            largest = torch.maximum(largest, gap_R.double().max()) if gap_R.numel() else largest
            advance(len(part.indices))
        entropy_sum, mismatch_sum = self._all_reduce(sums, dist.ReduceOp.SUM).tolist()
        mismatch_max = self._all_reduce(largest, dist.ReduceOp.MAX).item()
        return ScoredMiniBatch(batch, micro, entropy_sum / batch.response_tokens, mismatch_sum, mismatch_max)

    def _gradient_pass(self, batch: ScoredMiniBatch, stage: StageConfig, sign: float, advance: Advance) -> dict[str, float]:
        """Forward and backward of every micro-batch; gradients are left summed over ranks.

        Returns the global SUMS with the global ratio_max and ratio_min.
        """
        entropy_weight = sign * stage.objective.entropy_coefficient / batch.whole.response_tokens
        results = []
        for micro in batch.micro:
            inputs = loss_inputs(micro, stage, entropy_weight)
            result: PolicyLoss = self.policy(micro, lambda hidden, weight, i=inputs: linear_policy_loss(hidden, weight, i))
            (result.loss * self._ranks).backward()
            results.append(result)
            advance(len(micro.indices))
        return self._reduce(results)

    def _reduce(self, results: Sequence[PolicyLoss]) -> dict[str, float]:
        local = torch.stack([torch.stack([getattr(result, name).double() for name in SUMS]) for result in results]).sum(0)
        sums = dict(zip(SUMS, self._all_reduce(local, dist.ReduceOp.SUM).tolist(), strict=True))
        extremes = torch.stack([
            torch.stack([result.ratio_max for result in results]).max(),
            -torch.stack([result.ratio_min for result in results]).min(),
        ]).double()  # fmt: skip
        sums["ratio_max"], negative_min = self._all_reduce(extremes, dist.ReduceOp.MAX).tolist()
        sums["ratio_min"] = -negative_min
        return sums

    def _step(self, config: ActorConfig) -> tuple[float, float, bool]:
        """Clip and step at the rate of now; no step where the gradient is not finite.

        Returns (gradient norm before the clip, learning rate, whether the step was skipped).
        """
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm, foreach=False)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        lr = learning_rate(config, self.updates)
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"], group["betas"], group["weight_decay"] = lr, config.betas, config.weight_decay
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return grad_norm, lr, skipped

    def _all_reduce(self, value: Tensor, operation: dist.ReduceOp) -> Tensor:
        if self._ranks > 1:
            dist.all_reduce(value, op=operation)
        return value


def entropy_sign(mean_entropy: float, objective: ObjectiveConfig) -> float:
    """d |H - target| / dH for TER; 0 without TER, and at the target itself (a subgradient)."""
    if objective.entropy_target is None or objective.entropy_coefficient == 0:
        return 0.0
    return float((mean_entropy > objective.entropy_target) - (mean_entropy < objective.entropy_target))


def entropy_loss(mean_entropy: float, objective: ObjectiveConfig) -> float:
    """TER's term as a number; 0 without TER. The formula, with its gradient: `kernels.reference.entropy_regularizer`."""
    if objective.entropy_target is None:
        return 0.0
    return objective.entropy_coefficient * abs(mean_entropy - objective.entropy_target)


def learning_rate(config: ActorConfig, updates: int) -> float:
    """Linear rise over `warmup_steps` optimizer steps, then constant. updates: steps taken so far."""
    return config.lr * min(1.0, (updates + 1) / config.warmup_steps) if config.warmup_steps else config.lr


def loss_inputs(micro: MicroBatch, stage: StageConfig, entropy_weight: float) -> PolicyLossInputs:
    """A scored micro-batch as the loss head takes it."""
    return PolicyLossInputs(
        labels_T=micro.labels_R,
        old_logprob_T=micro.old_logprob_R,
        advantage_T=micro.advantage_R,
        weight_T=micro.weight_R,
        clip_low=stage.objective.clip_low,
        clip_high=stage.objective.clip_high,
        entropy_weight=entropy_weight,
        ref_logprob_T=micro.ref_logprob_R,
        kl_coefficient=stage.objective.kl_coefficient,
        temperature=stage.sampling.temperature,
    )
