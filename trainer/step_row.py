"""One train row of metrics.jsonl from what a step's stages returned: a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rollout.recovery import Ledger
from rollout.reward.correctness import needs_judge
from rollout.sampler import Collected
from rollout.types import Group
from trainer.actor import ScoredMiniBatch, UpdateResult
from trainer.config import StageConfig


def step_row(
    collected: Collected,
    scored: Sequence[ScoredMiniBatch],
    updates: Sequence[UpdateResult],
    ledger: Ledger,
    pending: int,
    stage: StageConfig,
) -> dict[str, Any]:
    """What a step measured, without step number and times. Verdicts and lengths are over every output sampled in the step,
    rewards over those of them that have a verdict; losses, entropy and ratios over the outputs trained on. Mismatch is
    `trainer.mismatch`'s, which is asked earlier."""
    return {
        **_sampled(collected.sampled),
        **_trained(updates, stage),
        **_importance(scored, stage),
        "sampling/rounds": collected.rounds,
        "sampling/over_generation": len(collected.sampled) / len(collected.batch),
        **{f"ledger/{fate}": count for fate, count in ledger.as_dict().items()},
        "ledger/pending": ledger.pending(),
        "recovery/size": pending,
    }


def unjudged_note(groups: Sequence[Group]) -> str | None:
    """What a person should know of a step in which the judge left samples without a verdict; None where it left none."""
    failed = [group for group in groups if not group.judged]
    if not failed:
        return None
    whys = Counter(verdict.detail for group in failed for verdict in group.verdicts if not verdict.judged)
    ((why, _),) = whys.most_common(1)
    asked = sum(needs_judge(group.prompt) for group in groups)
    return f"{len(failed)} of {asked} groups for the judge failed: {whys.total()} samples have no verdict ({why})"


def _sampled(groups: Sequence[Group]) -> dict[str, float]:
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    if not verdicts:
        return {}
    lengths = np.array([len(sample.token_ids) for group in groups for sample in group.samples])
    judged = np.array([verdict.judged for verdict in verdicts])
    right = np.array([verdict.right for verdict in verdicts])
    row = {
        "language/mixed": float(np.mean([verdict.mixed for verdict in verdicts])),
        "length/mean": float(lengths.mean()),
        "length/max": int(lengths.max()),
    }
    if judged.any():
        row["reward/mean"] = float(np.mean([verdict.reward for verdict in verdicts if verdict.judged]))
        row["reward/accuracy"] = float(right[judged].mean())
    if right.any():
        row["length/right"] = float(lengths[right].mean())
    if (wrong := judged & ~right).any():
        row["length/wrong"] = float(lengths[wrong].mean())
    if any(needs_judge(group.prompt) for group in groups):
        row["sampling/unjudged"] = sum(not group.judged for group in groups)
    reasons = Counter(verdict.reason for verdict in verdicts)
    return row | {f"verdict/{reason}": count / len(verdicts) for reason, count in sorted(reasons.items())}


def _trained(updates: Sequence[UpdateResult], stage: StageConfig) -> dict[str, Any]:
    """Means and extremes over the step's mini-batches that were trained on; where all were skipped, over all of them."""
    skipped = sum(update.skipped for update in updates)
    if skipped < len(updates):
        updates = [update for update in updates if not update.skipped]

    def mean(name: str) -> float:
        return sum(getattr(update, name) for update in updates) / len(updates)

    row = {
        "loss/total": mean("policy_loss") + mean("entropy_loss"),
        "loss/policy": mean("policy_loss"),
        "entropy/mean": mean("mean_entropy"),
        "grad_norm": mean("grad_norm"),
        "lr": updates[-1].lr,
        "ratio/max": max(update.ratio_max for update in updates),
        "ratio/min": min(update.ratio_min for update in updates),
        "clip/low": mean("clipped_low"),
        "clip/high": mean("clipped_high"),
        "kl/old_new": mean("old_kl"),
        "guard/skipped": skipped,
    }
    if stage.objective.entropy_target is not None:
        row |= {
            "entropy/target": stage.objective.entropy_target,
            "loss/entropy": mean("entropy_loss"),
            "ter/sign_misses": sum(update.sign_missed for update in updates),
        }
    if stage.objective.kl_coefficient > 0:
        row |= {"loss/kl": stage.objective.kl_coefficient * mean("ref_kl"), "kl/reference": mean("ref_kl")}
    return row


def _importance(scored: Sequence[ScoredMiniBatch], stage: StageConfig) -> dict[str, float]:
    """The truncated importance weights of all response tokens; nothing where there are none."""
    if stage.objective.tis_cap is None:
        return {}
    tokens = [batch.whole.response_tokens for batch in scored]

    def mean(name: str) -> float:
        return sum(getattr(batch, name) * count for batch, count in zip(scored, tokens, strict=True)) / sum(tokens)

    return {"tis/weight_mean": mean("tis_weight"), "tis/capped": mean("tis_capped")}
