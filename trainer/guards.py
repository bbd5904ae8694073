"""What must not be learnt from: numbers that are not finite. A mini-batch with one is skipped, kept for study, and counted.

A mini-batch has a fault where one of these is NaN or infinite, looked at in this order:

    sampled log-probability      the engine's, of any response token
    recomputed log-probability   the policy's own under the scoring weights, or the reference's
    loss                         the policy loss, or the mean entropy
    gradient                     its norm over all parameters

Each is known to every rank or summed over all of them before it is looked at, so that all ranks decide alike. No optimizer step
is taken then: weights, moments, the rate's clock and all that follows are as if the mini-batch had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config_guards import GuardsConfig
from trainer.metrics import number

if TYPE_CHECKING:
    from trainer.batch import MiniBatch

SAMPLED, RECOMPUTED, LOSS, GRADIENT = "sampled log-probability", "recomputed log-probability", "loss", "gradient"
LOOK_AT = {
    SAMPLED: "the engine that sampled it (its dtype, its log), and the last weight push",
    RECOMPUTED: "the weights of the last checkpoints, and model.precision",
    LOSS: "ratio/max and kl/old_new of the steps before, and objective.*",
    GRADIENT: "grad_norm of the steps before, actor.lr and actor.max_grad_norm",
}


def unfit(whole: MiniBatch, recomputed_lost: int) -> str | None:
    """The fault of a scored mini-batch, or None. recomputed_lost: log-probabilities of all ranks that are not finite."""
    if not all(np.isfinite(sequence.sampled_logprobs).all() for sequence in whole.sequences):
        return SAMPLED
    return RECOMPUTED if recomputed_lost else None


def fault_of(policy_loss: float = 0.0, mean_entropy: float = 0.0, grad_norm: float = 0.0) -> str | None:
    """The fault of a gradient pass, or None. All over all ranks."""
    if not (math.isfinite(policy_loss) and math.isfinite(mean_entropy)):
        return LOSS
    return None if math.isfinite(grad_norm) else GRADIENT


class Guard:
    """Counts the steps in a row with a skipped mini-batch. Kept on rank 0; rebuilt from the metrics rows when a run goes on."""

    def __init__(self, settings: GuardsConfig, quarantine: str | None, note: Callable[[str], None]) -> None:
        """quarantine: the folder, for messages; None where nothing is kept."""
        self._limit, self._quarantine, self._note = settings.max_skipped, quarantine, note
        self._steps: list[int] = []
        self._fault = GRADIENT

    def recall(self, rows: Sequence[dict[str, Any]]) -> None:
        """rows: the train rows up to the checkpoint that the run goes on from, in order."""
        self._steps = []
        for row in rows:
            self._steps = [*self._steps, row["step"]] if number(row, "guard/skipped") else []

    def see(self, step: int, faults: Sequence[str | None]) -> None:
        """faults: of step number `step`'s mini-batches, None where one was trained on."""
        for at, fault in enumerate(faults):
            if fault is not None:
                self._fault = fault
                self._note(f"step {step}: mini-batch {at + 1} of {len(faults)} not trained on: its {fault} is not finite")
        self._steps = [*self._steps, step] if any(faults) else []

    def why_stop(self) -> str | None:
        """One line where too many steps in a row had a mini-batch skipped."""
        if len(self._steps) < self._limit:
            return None
        kept = f"; what was left out is in {self._quarantine}" if self._quarantine else ""
        return (
            f"steps {self._steps[0]} to {self._steps[-1]} each had a mini-batch that could not be trained on, the last for its "
            f"{self._fault} (guards.max_skipped: {self._limit}); look at {LOOK_AT[self._fault]}{kept}"
        )
