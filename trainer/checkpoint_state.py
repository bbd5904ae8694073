"""What a run must remember beside its tensors, as JSON with arrays beside it.

state.json          step, optimizer steps, prompt cursors, ledger, the recovery buffer's prompts and verdicts
arrays.safetensors  the recovery buffer's tokens and log-probabilities; each rank's random state
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from rollout.errors import InputError
from rollout.recovery import Ledger
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.checkpoint_folder import ARRAYS, STATE, flush
from trainer.disk import refusals

FORMAT = 2
"""Of a checkpoint's folder. 1 kept the optimizer's settings as pickles among the tensors."""


@dataclass(slots=True)
class RunState:
    """Rank 0's state between two steps."""

    step: int = 0
    """Steps finished; also the weight version."""
    ledger: Ledger = field(default_factory=Ledger)
    buffer: list[Group] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Prompts file → cursor (`PromptSource.state`)."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A state as it was when it was packed: text and copies of its arrays."""

    record: str
    arrays: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return len(self.record.encode()) + sum(array.nbytes for array in self.arrays.values())

    def write(self, folder: Path, random_states: list[np.ndarray]) -> None:
        arrays = self.arrays | {f"random.{rank}": value for rank, value in enumerate(random_states)}
        with refusals(folder / ARRAYS):
            save_file(arrays, folder / ARRAYS)
        (folder / STATE).write_text(self.record, encoding="utf-8")
        for name in (ARRAYS, STATE):
            flush(folder / name)


def pack(state: RunState, updates: int, ranks: int) -> Packed:
    """updates: optimizer steps taken. ranks: how many save, each with its random state."""
    groups, arrays = pack_groups(state.buffer)
    record = {
        "format": FORMAT,
        "step": state.step,
        "updates": updates,
        "ranks": ranks,
        "ledger": state.ledger.as_dict(),
        "sources": state.sources,
        "buffer": groups,
    }
    return Packed(json.dumps(record, indent=1), arrays)  # ASCII: half a surrogate pair in a text must not end every save


def read(folder: Path) -> tuple[RunState, int, list[np.ndarray]]:
    """(rank 0's state, optimizer steps, each rank's random state). Raises InputError."""
    try:
        record = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise InputError(
                f"{folder / STATE}: format {record['format']}, and this version reads {FORMAT}: continue with the version that "
                "wrote it, or name another run"
            )
        arrays = load_file(folder / ARRAYS)
        state = RunState(record["step"], Ledger(**record["ledger"]), unpack_groups(record["buffer"], arrays), record["sources"])
        return state, record["updates"], [arrays[f"random.{rank}"] for rank in range(record["ranks"])]
    except InputError:
        raise
    except Exception as error:  # of JSON, safetensors, or a field of another kind: whatever it is, the file is not ours
        raise InputError(
            f"{folder}: {STATE} or {ARRAYS} does not hold a run's state ({error.__class__.__name__}: {error}); move this "
            "checkpoint away to continue from the one before"
        ) from error


def pack_groups(groups: list[Group]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Groups as JSON with copies of their arrays beside, under 'group.sample.name'."""
    records, arrays = [], {}
    for at, group in enumerate(groups):
        prompt = group.prompt
        arrays[f"{at}.prompt"] = group.prompt_token_ids.copy()
        samples = []
        for k, (sample, verdict) in enumerate(zip(group.samples, group.verdicts, strict=True)):
            arrays[f"{at}.{k}.tokens"], arrays[f"{at}.{k}.logprobs"] = sample.token_ids.copy(), sample.logprobs.copy()
            judged = (verdict.right, verdict.reason, verdict.detail, verdict.mixed)
            samples.append([sample.finish_reason, sample.weight_version, *judged])
        fields = {name: getattr(prompt, name) for name in Prompt.__dataclass_fields__}
        records.append({"prompt": fields, "drawn_step": group.drawn_step, "samples": samples})
    return records, arrays


def unpack_groups(records: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[Group]:
    return [
        Group(
            prompt=Prompt(**record["prompt"]),
            prompt_token_ids=arrays[f"{at}.prompt"],
            samples=tuple(
                Sample(arrays[f"{at}.{k}.tokens"], arrays[f"{at}.{k}.logprobs"], finish, version)
                for k, (finish, version, *_) in enumerate(record["samples"])
            ),
            verdicts=tuple(Verdict(*verdict) for _, _, *verdict in record["samples"]),
            drawn_step=record["drawn_step"],
        )
        for at, record in enumerate(records)
    ]
