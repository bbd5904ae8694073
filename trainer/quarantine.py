"""Mini-batches that were not trained on, kept for study.

    RUN/quarantine/step-000123-mini-0/
        batch.json          reason, step, weight version, loss, entropy, gradient norm; prompts and verdicts; advantages
        arrays.safetensors  token ids, sampled and recomputed log-probabilities, named as in a checkpoint: "group.prompt",
                            "group.sample.tokens", "group.sample.logprobs", "group.sample.recomputed"

Written as step-000123-mini-0.tmp and renamed. Only the newest are kept. `read_batch` gives one back.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from rollout.ranks import Ranks
from rollout.types import Group
from trainer.actor import ScoredMiniBatch, UpdateResult
from trainer.checkpoint_state import pack_groups, unpack_groups
from trainer.disk import refusals
from trainer.token_values import gathered, key_of

FOLDER = "quarantine"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class KeptBatch:
    """facts: what batch.json says beside its groups. advantages, recomputed: of each group, of each sample."""

    facts: dict[str, Any]
    groups: list[Group]
    advantages: list[list[float]]
    recomputed: list[list[np.ndarray]]


class Quarantine:
    """Of one run. keep: folders at most. together: ranks that share each micro-batch's tokens. note: told what failed."""

    def __init__(self, run: Path, keep: int, ranks: Ranks, together: int, note: Callable[[str], None]) -> None:
        self.folder = run / FOLDER
        self._keep, self._ranks, self._together, self._note = keep, ranks, together, note

    def keep(
        self, step: int, groups: Sequence[Group], scored: Sequence[ScoredMiniBatch], updates: Sequence[UpdateResult]
    ) -> None:
        """Writes those of step number `step` that were skipped. groups: the step's batch, of which each mini-batch is an equal
        part. A collective where one was skipped, which all ranks know alike."""
        size = len(groups) // len(scored)
        for at, (batch, update) in enumerate(zip(scored, updates, strict=True)):
            if not update.skipped:
                continue
            recomputed = gathered(self._ranks, self._together, [batch], lambda micro: micro.old_logprob_R)
            if self._ranks.first:
                facts = _facts(step, at, update)
                try:
                    self._write(facts, groups[at * size : (at + 1) * size], batch, recomputed)
                except OSError as error:
                    self._note(f"step {step}: the skipped mini-batch could not be kept in {self.folder} ({error.strerror})")

    def _write(
        self, facts: dict[str, Any], groups: Sequence[Group], batch: ScoredMiniBatch, recomputed: dict[bytes, np.ndarray]
    ) -> None:
        records, arrays = pack_groups(list(groups))
        sequences = iter(batch.whole.sequences)
        for g, group in enumerate(groups):
            for k in range(len(group.samples)):
                sequence = next(sequences)
                arrays[f"{g}.{k}.recomputed"] = recomputed[key_of(sequence.prompt, sequence.response)]
                records[g].setdefault("advantages", []).append(sequence.advantage)
        final = self.folder / f"step-{facts['step']:06d}-mini-{facts['mini_batch']}"
        beside = final.with_name(final.name + ".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        try:
            with refusals(beside / "arrays.safetensors"):
                save_file(arrays, beside / "arrays.safetensors")
            text = json.dumps(facts | {"groups": records}, indent=1, allow_nan=False)
            (beside / "batch.json").write_text(text, encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        for old in kept_folders(self.folder)[: -self._keep]:
            shutil.rmtree(old)


def kept_folders(folder: Path) -> list[Path]:
    """By step and mini-batch, oldest first."""
    found = [path for path in folder.glob("step-*-mini-*") if path.suffix != ".tmp"]
    return sorted(found, key=lambda path: [int(part) for part in path.name.split("-")[1::2]])


def read_batch(folder: Path) -> KeptBatch:
    record = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    arrays = load_file(folder / "arrays.safetensors")
    records = record.pop("groups")
    advantages = [each.pop("advantages") for each in records]
    recomputed = [[arrays[f"{g}.{k}.recomputed"] for k in range(len(row))] for g, row in enumerate(advantages)]
    return KeptBatch(record, unpack_groups(records, arrays), advantages, recomputed)


def _facts(step: int, at: int, update: UpdateResult) -> dict[str, Any]:
    """weight_version: of the weights that scored it and that were to be changed. JSON has no NaN: it is a word here."""
    measured = {
        "policy_loss": update.policy_loss,
        "mean_entropy": update.mean_entropy,
        "grad_norm": update.grad_norm,
        "ratio_max": update.ratio_max,
        "ratio_min": update.ratio_min,
        "lr": update.lr,
    }
    facts = {"format": FORMAT, "reason": update.fault, "step": step, "mini_batch": at, "weight_version": step - 1}
    return facts | {name: value if math.isfinite(value) else repr(value) for name, value in measured.items()}
