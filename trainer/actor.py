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
from torch.distributed.tensor import DTensor

from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import PolicyLoss, PolicyLossInputs, linear_policy_loss
from trainer.batch import MicroBatch, MiniBatch, micro_batches
from trainer.config import ActorConfig, ObjectiveConfig, StageConfig
from trainer.guards import fault_of, unfit
from trainer.mismatch import Mismatch, MismatchSums, tis_weights
from trainer.optimizer import build_optimizer
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
    mismatch: Mismatch
    """Between the sampler's log-probabilities and these."""
    tis_weight: float
    """Mean truncated importance weight of all ranks' response tokens, recovered ones too; without TIS no cap."""
    tis_capped: float
    """Share of them at the cap."""
    parts: list[MiniBatch]
    """Of each micro-batch, the part that its indices point into."""
    fault: str | None
    """Why it must not be trained on, as `trainer.guards.unfit` says; the same on all ranks."""


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
    fault: str | None
    """Why no optimizer step was taken (`trainer.guards.fault_of`); None: it was. The same on all ranks."""

    @property
    def skipped(self) -> bool:
        return self.fault is not None


class Actor:
    """policy: sharded (`trainer.policy.shard`). reference: sharded and frozen, or None where no stage has a KL term. optimizer:
    the policy's (`trainer.optimizer`); None: AdamW."""

    def __init__(
        self,
        policy: Policy,
        config: ActorConfig,
        *,
        rank: int,
        ranks: int,
        device: torch.device,
        reference: Policy | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.policy = policy
        self._reference = reference
        self._rank, self._ranks, self.device = rank, ranks, device
        self.optimizer = optimizer or build_optimizer(policy, config)
        self.updates = 0
        """Optimizer steps taken so far; the learning rate's clock."""

    @torch.no_grad()
    def score(
        self,
        batches: Sequence[MiniBatch],
        stage: StageConfig,
        advance: Advance = lambda *_: None,
        token_bound: float = math.inf,
    ) -> list[ScoredMiniBatch]:
        """Old log-probabilities (and the reference's, if there is a KL term) of every mini-batch under the weights of now.

        token_bound: nats, above which a token's difference from its sampled log-probability counts as `Mismatch.beyond`.
        """
        scored = []
        for batch in batches:
            scoring = Scoring(self, stage, token_bound)
            scoring.add(batch, advance)
            scored.append(scoring.finish(batch))
        return scored

    def update(self, batch: ScoredMiniBatch, stage: StageConfig, advance: Advance = lambda *_: None) -> UpdateResult:
        """One optimizer step on a mini-batch.

        TER's sign is assumed from the scoring pass; where the mean entropy of this very pass lies on the other side of the
        target, the gradient is dropped and formed again with the right sign.

        Where a log-probability, the loss or the gradient is not finite no step is taken: weights, moments and the rate's clock
        are then as if the mini-batch had not been.
        """
        objective = stage.objective
        assumed = entropy_sign(batch.mean_entropy, objective)
        sums = self._gradient_pass(batch, stage, assumed, advance)
        tokens = batch.whole.response_tokens
        true_sign = entropy_sign(sums["entropy_sum"] / tokens, objective)
        if missed := math.isfinite(sums["entropy_sum"]) and true_sign != assumed:
            self.optimizer.zero_grad()
            sums = self._gradient_pass(batch, stage, true_sign, lambda *_: None)
        mean_entropy = sums["entropy_sum"] / tokens
        fault = batch.fault or fault_of(sums["policy_loss"], mean_entropy)
        grad_norm, lr, fault = self._step(stage.actor, fault)
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
            fault=fault,
        )  # fmt: skip

    def update_supervised(self, batch: MiniBatch, config: ActorConfig) -> tuple[float, float]:
        """One optimizer step of maximum likelihood, for the warm-up: loss = -sum_t weight_t · logprob_t.

        Returns (loss, gradient norm), over all ranks.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro in self.pack(batch, config):
            logprob_R, _ = self.policy(micro, lambda hidden, weight, m=micro: linear_logprob_entropy(hidden, weight, m.labels_R))
            loss = -(logprob_R * micro.weight_R).sum()
            (loss * self._ranks).backward()
            total += loss.detach()
        grad_norm, _, _ = self._step(config)
        return self.all_reduce(total, dist.ReduceOp.SUM).item(), grad_norm

    def pack(self, batch: MiniBatch, config: ActorConfig) -> list[MicroBatch]:
        """This rank's micro-batches."""
        return micro_batches(
            batch, rank=self._rank, ranks=self._ranks, budget=config.tokens_per_micro_batch,
            at_least=config.micro_batches or 1, device=self.device, attention=self.policy.attention,
        )  # fmt: skip

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

    def score_micro(self, micro: MicroBatch, stage: StageConfig) -> None:
        """Fills the old log-probabilities (and the reference's) and the entropies."""
        score = lambda hidden, weight: linear_logprob_entropy(hidden, weight, micro.labels_R, stage.sampling.temperature)  # noqa: E731
        micro.old_logprob_R, micro.entropy_R = self.policy(micro, score)
        if stage.objective.kl_coefficient > 0:
            micro.ref_logprob_R, _ = self._reference(micro, score)

    def _reduce(self, results: Sequence[PolicyLoss]) -> dict[str, float]:
        local = torch.stack([torch.stack([getattr(result, name).double() for name in SUMS]) for result in results]).sum(0)
        sums = dict(zip(SUMS, self.all_reduce(local, dist.ReduceOp.SUM).tolist(), strict=True))
        extremes = torch.stack([
            torch.stack([result.ratio_max for result in results]).max(),
            -torch.stack([result.ratio_min for result in results]).min(),
        ]).double()  # fmt: skip
        sums["ratio_max"], negative_min = self.all_reduce(extremes, dist.ReduceOp.MAX).tolist()
        sums["ratio_min"] = -negative_min
        return sums

    def _step(self, config: ActorConfig, fault: str | None = None) -> tuple[float, float, str | None]:
        """Clip and step at the rate of now; no step where there is a fault, or the gradient is not finite.

        Returns (gradient norm before the clip, inf where it is not finite; learning rate; the fault).
        """
        parameters = list(self.policy.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # In fp32 whatever they are kept in: `get_total_norm` would sum and give bf16.
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # Copies of the model (HSDP) each sum their own shards: with one number for all they cannot drift apart. A maximum over
        # ranks may lose a NaN, and with it the decision to skip; it does not lose an infinity.
        norm = self.all_reduce(norm.nan_to_num(nan=math.inf, posinf=math.inf), dist.ReduceOp.MAX)
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm, foreach=False)
        grad_norm = float(norm)
        lr = learning_rate(config, self.updates)
        fault = fault or fault_of(grad_norm=grad_norm)
        if fault is None:
            for group in self.optimizer.param_groups:
                group["lr"], group["betas"], group["weight_decay"] = lr, config.betas, config.weight_decay
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad()
        return grad_norm, lr, fault

    def all_reduce(self, value: Tensor, operation: dist.ReduceOp) -> Tensor:
        """In place, over all ranks."""
        if self._ranks > 1:
            dist.all_reduce(value, op=operation)
        return value


class Scoring:
    """One mini-batch, scored in as many parts as come: what is known to be in it can be scored while the rest is still sampled.

    Every part is a MiniBatch whose token weights are those of the whole. All methods are collectives; none keeps a graph.
    """

    def __init__(self, actor: Actor, stage: StageConfig, token_bound: float = math.inf) -> None:
        self._actor, self._stage = actor, stage
        self._micro: list[MicroBatch] = []
        self._parts: list[MiniBatch] = []
        self._sums_4 = torch.zeros(4, dtype=torch.float64, device=actor.device)
        self._mismatch = MismatchSums(token_bound, actor.device)

    @torch.no_grad()
    def add(self, part: MiniBatch, advance: Advance = lambda *_: None) -> None:
        """Scores these sequences."""
        cap = self._stage.objective.tis_cap or math.inf
        for micro in self._actor.pack(part, self._stage.actor):
            self._actor.score_micro(micro, self._stage)
            self._mismatch.add(micro.old_logprob_R, micro.sampled_logprob_R, micro.fresh_R)
            tis_R = tis_weights(micro.old_logprob_R, micro.sampled_logprob_R, cap)
            lost_R = ~micro.old_logprob_R.isfinite()
            if micro.ref_logprob_R is not None:
                lost_R |= ~micro.ref_logprob_R.isfinite()
            self._sums_4 += torch.stack([values_R.double().sum() for values_R in (micro.entropy_R, tis_R, tis_R >= cap, lost_R)])
            self._micro.append(micro)
            self._parts.append(part)
            advance(len(micro.indices))

    def finish(self, whole: MiniBatch) -> ScoredMiniBatch:
        """whole: all sequences that were added, in any order. Called once."""
        sums_4 = self._actor.all_reduce(self._sums_4, dist.ReduceOp.SUM)
        self._actor.all_reduce(self._mismatch.sums, dist.ReduceOp.SUM)
        self._actor.all_reduce(self._mismatch.largest, dist.ReduceOp.MAX)
        mean_entropy, tis_weight, tis_capped = (sums_4[:3] / whole.response_tokens).tolist()
        mismatch = self._mismatch.result(whole.fresh_tokens)
        fault = unfit(whole, recomputed_lost=int(sums_4[3]))
        return ScoredMiniBatch(whole, self._micro, mean_entropy, mismatch, tis_weight, tis_capped, self._parts, fault)


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
    """A scored micro-batch as the loss head takes it; with TIS, each advantage times its token's importance weight."""
    advantage_R = micro.advantage_R
    if stage.objective.tis_cap is not None:
        advantage_R = advantage_R * tis_weights(micro.old_logprob_R, micro.sampled_logprob_R, stage.objective.tis_cap)
    return PolicyLossInputs(
        labels_T=micro.labels_R,
        old_logprob_T=micro.old_logprob_R,
        advantage_T=advantage_R,
        weight_T=micro.weight_R,
        clip_low=stage.objective.clip_low,
        clip_high=stage.objective.clip_high,
        entropy_weight=entropy_weight,
        ref_logprob_T=micro.ref_logprob_R,
        kl_coefficient=stage.objective.kl_coefficient,
        temperature=stage.sampling.temperature,
    )
