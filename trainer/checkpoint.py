"""Checkpoints: everything a run needs to continue as if it had not stopped.

    RUN/checkpoints/step-000010/
        dcp/                model and optimizer (torch.distributed.checkpoint), sharded as on the ranks; any number reads it
        state.json          step, optimizer steps, prompt cursors, ledger, the recovery buffer's prompts and verdicts
        arrays.safetensors  the recovery buffer's tokens and log-probabilities; each rank's random state
        manifest.json       size and SHA-256 of every other file; written last

Written as step-000010.tmp, flushed to disk and renamed: a folder without the suffix is whole. Sampling and data order draw from
seeds derived from (run seed, step, …), so the saved random state is a precaution and not what repeatability rests on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict

from rollout.errors import InputError
from rollout.ranks import Ranks
from rollout.recovery import Ledger
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.actor import Actor

FORMAT = 1


@dataclass(slots=True)
class RunState:
    """Rank 0's state between two steps."""

    step: int = 0
    """Steps finished; also the weight version."""
    ledger: Ledger = field(default_factory=Ledger)
    buffer: list[Group] = field(default_factory=list)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Prompts file → cursor (`PromptSource.state`)."""


class Checkpoints:
    """Of one run folder. note: where to say that a checkpoint was skipped. All methods but `newest` are collectives."""

    def __init__(self, run: Path, ranks: Ranks, keep: int, note: Callable[[str], None]) -> None:
        self._folder = run / "checkpoints"
        self._ranks, self._keep, self._note = ranks, keep, note

    def save(self, actor: Actor, state: RunState) -> None:
        """Writes a checkpoint for `state.step` and drops all but the newest `keep`."""
        final = self._folder / f"step-{state.step:06d}"
        beside = final.with_suffix(".tmp")
        if self._ranks.first:
            shutil.rmtree(beside, ignore_errors=True)
            (beside / "dcp").mkdir(parents=True)
        self._ranks.broadcast(None)  # no rank writes before the folder is there
        model, optimizer = get_state_dict(actor.policy, actor.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=beside / "dcp")
        random_states = self._ranks.gather(torch.get_rng_state().numpy())
        if self._ranks.first:
            self._write_state(beside, state, actor.updates, random_states)
            _write_manifest(beside)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(beside, final)
            flush(self._folder)
            self._prune(final)
        self._ranks.broadcast(None)  # the checkpoint exists when save returns, on every rank

    def resume(self, actor: Actor) -> RunState:
        """Restores the newest complete checkpoint into `actor` and gives its state; a fresh state where there is none."""
        folder = self._ranks.broadcast(self.newest() if self._ranks.first else None)
        if folder is None:
            return RunState()
        model, optimizer = get_state_dict(actor.policy, actor.optimizer)
        _check_kinds(folder, model, optimizer)
        # Into the policy's and the optimizer's own tensors; rates and betas are set by each update. torch's set_state_dict would
        # move offloaded moments to the GPU, and give moments the dtype of their weights.
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")
        state, actor.updates, random_states = _read_state(folder)
        if len(random_states) == self._ranks.size:
            torch.set_rng_state(torch.from_numpy(random_states[self._ranks.rank]))
        return state

    def newest(self) -> Path | None:
        """The newest checkpoint that its manifest confirms; one that is not whole is named and skipped."""
        for folder in reversed(self._folders()):
            problem = _damage(folder)
            if problem is None:
                return folder
            self._note(f"checkpoint {folder.name} skipped: {problem}")
        return None

    def _folders(self) -> list[Path]:
        return folders_of(self._folder)

    def _prune(self, newest: Path) -> None:
        """Drops what is older than the `keep` newest, what a kill left half written, and checkpoints of later steps: those were
        skipped as damaged, and would push whole ones out."""
        folders = self._folders()
        kept = folders[: folders.index(newest) + 1][-self._keep :]
        for folder in self._folder.glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder)

    @staticmethod
    def _write_state(folder: Path, state: RunState, updates: int, random_states: list[np.ndarray]) -> None:
        groups, arrays = _pack_groups(state.buffer)
        arrays |= {f"random.{rank}": value for rank, value in enumerate(random_states)}
        record = {
            "format": FORMAT,
            "step": state.step,
            "updates": updates,
            "ranks": len(random_states),
            "ledger": state.ledger.as_dict(),
            "sources": state.sources,
            "buffer": groups,
        }
        save_file(arrays, folder / "arrays.safetensors")
        (folder / "state.json").write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")


def folders_of(checkpoints: Path) -> list[Path]:
    """By step; whole ones and damaged ones."""
    return sorted(path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))


def complete_checkpoint(run: Path, step: int | None = None) -> Path:
    """Of a run folder: that of a step, or the newest that is whole. Raises InputError."""
    folders = folders_of(run / "checkpoints")
    if step is not None:
        wanted = run / "checkpoints" / f"step-{step:06d}"
        if wanted not in folders:
            raise InputError(f"{wanted}: no such checkpoint; there are {', '.join(each.name for each in folders) or 'none'}")
        folders = [wanted]
    problems = []
    for folder in reversed(folders):
        problem = _damage(folder)
        if problem is None:
            return folder
        problems.append(f"{folder.name}: {problem}")
    raise InputError(f"{run}/checkpoints: no complete checkpoint ({'; '.join(problems) or 'none at all'})")


def _check_kinds(folder: Path, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    """Raises InputError unless a checkpoint has these tensors in these dtypes: reading would cast, or end in a traceback."""
    wanted = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, state in optimizer["state"].items():
        wanted |= {f"optimizer.state.{name}.{key}": tensor for key, tensor in state.items()}
    stored = FileSystemReader(folder / "dcp").read_metadata().state_dict_metadata
    for name, tensor in wanted.items():
        properties = getattr(stored.get(name), "properties", None)
        if properties is None or properties.dtype != tensor.dtype:
            there = "is not there" if properties is None else f"is {properties.dtype}"
            raise InputError(
                f"{folder}: {name} {there}, and this run's is {tensor.dtype}: set model.weights and optimizer.kind to what they "
                "were, or start another run from an export (python -m trainer.export)"
            )


def _read_state(folder: Path) -> tuple[RunState, int, list[np.ndarray]]:
    """(rank 0's state, optimizer steps, each rank's random state)."""
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise RuntimeError(f"{folder}/state.json: format {record['format']}, this version reads {FORMAT}")
    arrays = load_file(folder / "arrays.safetensors")
    state = RunState(record["step"], Ledger(**record["ledger"]), _unpack_groups(record["buffer"], arrays), record["sources"])
    return state, record["updates"], [arrays[f"random.{rank}"] for rank in range(record["ranks"])]


def _pack_groups(groups: list[Group]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Groups as JSON with their arrays beside, under 'group.sample.name'."""
    records, arrays = [], {}
    for at, group in enumerate(groups):
        prompt = group.prompt
        arrays[f"{at}.prompt"] = group.prompt_token_ids
        samples = []
        for k, (sample, verdict) in enumerate(zip(group.samples, group.verdicts, strict=True)):
            arrays[f"{at}.{k}.tokens"], arrays[f"{at}.{k}.logprobs"] = sample.token_ids, sample.logprobs
            judged = (verdict.right, verdict.reason, verdict.detail, verdict.mixed)
            samples.append([sample.finish_reason, sample.weight_version, *judged])
        fields = {name: getattr(prompt, name) for name in Prompt.__dataclass_fields__}
        records.append({"prompt": fields, "drawn_step": group.drawn_step, "samples": samples})
    return records, arrays


def _unpack_groups(records: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> list[Group]:
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


def _write_manifest(folder: Path) -> None:
    """Flushes everything to disk, then lists the files."""
    files = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if path.is_dir():
            continue
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
    flush(manifest)
    flush(folder)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, facts in files.items():
            path = folder / name
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {facts['bytes']}"
            if _digest(path) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json or a file it names cannot be read ({error.__class__.__name__}: {error})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
