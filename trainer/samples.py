"""Samples of each step, kept for a reader: RUN/samples/step-000012.jsonl.gz, one line a group.

    {"step": 12, "stage": 0, "stage_name": "1 GRPO + TER",
     "prompt": {"id": "train-00017", "question": "…", "answer": "12", "source": "chain_sum"},
     "fate": "trained", "drawn_step": 12,
     "samples": [{"text": "…", "right": true, "reason": "right", "detail": "", "mixed": false, "finish": "stop", "version": 11,
                  "tokens": 57, "advantage": 0.7, "ends": [3, 5, …], "logprob": [-0.12, …], "entropy": [0.5, …]}, …]}

Steps count from 1, as in the metrics: step 12 samples from the weights of version 11. A file is written beside and renamed. Which
groups are kept: `trainer.sample_recorder`. No torch here.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.types import Prompt
from trainer.checkpoint_folder import flush
from trainer.metrics import aside

FOLDER, ASIDE = "samples", "samples.old"
NAME = re.compile(r"step-(\d{6,})\.jsonl\.gz")
UNFINISHED = ".tmp"
COMPRESSION = 4
"""gzip's level: 6 makes files 5 % smaller in more than twice the time."""
FATES = ("trained", "uniform", "recovered", "waiting", "expired", "failed")
"""What became of a group in its step: as in the ledger (`rollout.recovery.Ledger`); waiting: it went into the recovery buffer."""
TOKEN_FIELDS = ("ends", "logprob", "entropy")


@dataclass(frozen=True, slots=True)
class KeptSample:
    """One output. The lists have an item for each of its `tokens`; they are None where token detail was not kept."""

    text: str
    """Whole, special tokens visible; what the prompt ends with (template.prefill) is not a part of it."""
    right: bool
    reason: str
    detail: str
    mixed: bool
    finish: str
    version: int
    """Of the weights that sampled it."""
    tokens: int
    advantage: float | None
    """None where it was not trained on."""
    ends: list[int] | None = None
    """Where in `text` each token's characters end; tokens that share a character end behind it."""
    logprob: list[float | None] | None = None
    """Nats, as it was sampled; None for a number that is not finite."""
    entropy: list[float | None] | None = None
    """Nats, under the weights that scored it; None for the whole where it was not scored."""


@dataclass(frozen=True, slots=True)
class KeptGroup:
    """prompt: without solution and metadata. step, drawn_step: from 1; they differ in a recovered group."""

    step: int
    stage: int
    stage_name: str
    prompt: Prompt
    fate: str
    drawn_step: int
    samples: tuple[KeptSample, ...]


def read_samples(run: Path, note: Callable[[str], None] = lambda _: None) -> Iterator[KeptGroup]:
    """All groups of a run that can be read, by step. note: told of each file that is torn, or is none of these."""
    for path in files_of(run):
        yield from read_file(path, note)


def read_file(path: Path, note: Callable[[str], None] = lambda _: None) -> Iterator[KeptGroup]:
    """One step's groups, up to what cannot be read."""
    read = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield group_of(json.loads(line))
                read += 1
        if not read:  # to gzip a file without a byte is whole
            raise EOFError("it is empty")
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        why = f"{error.__class__.__name__}: {' '.join(str(error).split())}"
        note(f"{path}: cannot be read after {read} groups, which are used ({why})")


def files_of(run: Path) -> list[Path]:
    """By step."""
    return sorted((path for path in (run / FOLDER).glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def write_step(run: Path, step: int, groups: Iterable[KeptGroup]) -> None:
    """The file of a step, whole or not at all, and the same bytes each time. Raises OSError."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}.jsonl.gz"
    beside = final.with_name(final.name + UNFINISHED)
    try:
        with beside.open("wb") as file, gzip.GzipFile("", "wb", COMPRESSION, file, mtime=0) as packed:
            for group in groups:
                packed.write(line_of(group))
        flush(beside)
        os.replace(beside, final)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def drop_after(run: Path, step: int) -> None:
    """Leaves what a run that continues after `step` would have kept by then. A run that begins anew puts what an earlier start
    kept aside, as it does its metrics. Raises OSError."""
    folder = run / FOLDER
    if not folder.is_dir():
        return
    if step == 0:
        if any(folder.iterdir()):
            os.replace(folder, aside(run / ASIDE))
        return
    for path in [*folder.glob(f"step-*{UNFINISHED}"), *(path for path in files_of(run) if step_of(path) > step)]:
        path.unlink()


def line_of(group: KeptGroup) -> bytes:
    record = {
        "step": group.step,
        "stage": group.stage,
        "stage_name": group.stage_name,
        "prompt": {name: getattr(group.prompt, name) for name in ("id", "question", "answer", "source")},
        "fate": group.fate,
        "drawn_step": group.drawn_step,
        "samples": [
            {name: getattr(sample, name) for name in KeptSample.__slots__ if sample.ends is not None or name not in TOKEN_FIELDS}
            for sample in group.samples
        ],
    }
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"  # half a surrogate pair becomes JSON's own escape


def group_of(record: dict[str, Any]) -> KeptGroup:
    """Unknown keys are left out. Raises LookupError, TypeError or ValueError where it is not what `line_of` writes."""
    known = {name: record[name] for name in KeptGroup.__slots__}
    samples = tuple(
        KeptSample(**{name: sample[name] for name in KeptSample.__slots__ if name in sample}) for sample in record["samples"]
    )
    prompt = {name: value for name, value in record["prompt"].items() if name in Prompt.__slots__}
    return KeptGroup(**known | {"prompt": Prompt(**prompt), "samples": samples})
