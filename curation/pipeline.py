"""The steps in order, each finished step kept on the disk: killed at any instant and started again, a curation goes on after
the last step that it finished, and its output is the same to the byte.

Step 0 writes the rows; each later step writes only which rows it removed and why. A step's fingerprint is the hash of the one
before it, its own options and `FORMAT`, so a changed file or option makes exactly what depends on it be done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import report
from curation.errors import InputError
from curation.html import page
from curation.ingest import ingest
from curation.options import Options, Source
from curation.progress import Progress
from curation.steps.decontaminate import decontaminate, read_benchmarks
from curation.steps.exact import remove_exact
from curation.steps.fuzzy import remove_fuzzy
from curation.steps.ground_truth import remove_without_truth
from curation.steps.question_type import remove_types
from curation.steps.semantic import remove_semantic
from curation.steps.verifiable import remove_unverifiable
from curation.store import Outcome, Removed, Rows, Work, replacing

FORMAT = 1
"""Counted up when a step decides differently on the same input, so that no work of an older version is gone on with."""

Run = Callable[[Rows, Callable[[int], None]], Outcome]


@dataclass(frozen=True, slots=True)
class Step:
    """options: what the step's result depends on beside the rows it is given."""

    name: str
    title: str
    options: dict[str, Any]
    run: Run


@dataclass(frozen=True, slots=True)
class Done:
    """A finished step, from this run or an earlier one. seconds: what it took when it ran."""

    name: str
    title: str
    entered: int
    left: int
    removed: Removed
    notes: dict[str, Any]
    for_judge: tuple[int, ...]
    seconds: float
    reused: bool


def steps_for(benchmarks: Sequence[Source], options: Options) -> list[Step]:
    """The paper's order, without those that the options skip."""
    pick = options.deciding

    def check(rows: Rows, progress: Callable[[int], None]) -> Outcome:
        return decontaminate(rows, read_benchmarks(benchmarks, options), options, progress)

    fuzzy = pick("shingle", "fuzzy_threshold", "bands", "band_rows", "seed", "texts_alone")
    semantic = pick("semantic_threshold", "dimensions", "embedder", "seed", "texts_alone")
    steps = [
        Step("decontaminate", "test splits and benchmarks", pick("ngram", "overlap", "fields") | _files(benchmarks), check),
        Step("ground_truth", "synthetic, no ground truth", {}, lambda rows, progress: remove_without_truth(rows, progress)),
        Step("exact", "exact duplicates", {}, lambda rows, progress: remove_exact(rows, progress)),
        Step("fuzzy", "fuzzy duplicates", fuzzy, lambda rows, progress: remove_fuzzy(rows, options, progress)),
        Step("semantic", "semantic duplicates", semantic, lambda rows, progress: remove_semantic(rows, options, progress)),
        Step("question_type", "choice, true/false, proof", {}, lambda rows, progress: remove_types(rows, progress)),
        Step(
            "verifiable",
            "answers no rule can verify",
            pick("verify_seconds"),
            lambda rows, progress: remove_unverifiable(rows, options, progress),
        ),
    ]
    return [step for step in steps if step.name not in options.skip]


def curate(
    sources: Sequence[Source],
    benchmarks: Sequence[Source],
    options: Options,
    out: Path,
    work_path: Path | None = None,
    show: Progress | None = None,
) -> report.Report:
    """Read, clean and filter the sources, and write `out` and beside it its `.report.json`, `.report.html`, `.removed.parquet`
    and `.quarantine.jsonl`, each whole or not at all, `out` last.

    work_path: where finished steps are kept, also after the end; None: beside `out`, and gone when `out` is written.
    Raises InputError for whatever a user can mend; also where no row is left, after the report is written.
    """
    show = show or Progress(quiet=True)
    for source in (*sources, *benchmarks):
        if not source.path.is_file():
            raise InputError(f"{source.path}: there is no such file; check the path")
    new_folder = not out.parent.exists()
    work = Work(work_path or out.with_name(f".{out.name}.work"))
    done = False
    try:
        made = _curate(work, sources, benchmarks, options, out, show)
        done = True
    finally:
        if work_path is None and (done or work.is_empty()):
            work.discard()
            if new_folder and not any(out.parent.iterdir()):
                out.parent.rmdir()
        work.close()
    if not made.data["rows_kept"]:
        read = made.data["rows_read"]
        raise InputError(f"{out}: no row is left of {read:,}; {_beside(out, '.report.html')} says which step took them")
    return made


def _curate(
    work: Work, sources: Sequence[Source], benchmarks: Sequence[Source], options: Options, out: Path, show: Progress
) -> report.Report:
    notes, start, fingerprint = _read(work, sources, options, show)
    rows, done = start, []
    for number, step in enumerate(steps_for(benchmarks, options), start=1):
        fingerprint = _hash(fingerprint, step.name, step.options)
        finished = _step(work, f"{number:02d}-{step.name}", step, rows, fingerprint, show)
        rows = Outcome.without(rows, finished.removed).kept
        done.append(finished)
    made = report.make(start, rows, done, notes, [source.path.name for source in benchmarks], options)
    _write(out, work.path / "00-read", start, rows, done, made)
    return made


def _read(work: Work, sources: Sequence[Source], options: Options, show: Progress) -> tuple[dict[str, Any], Rows, str]:
    fingerprint = _hash("", "read", options.deciding("fields", "solutions") | _files(sources))
    state = work.finished("00-read", fingerprint)
    reused = state is not None
    if state is None:
        show.begin("read", "read and clean", None)
        started = time.monotonic()
        with work.writing("00-read") as folder:
            notes = ingest(sources, options, folder, show.advance)
            state = {"fingerprint": fingerprint, "notes": notes, "seconds": time.monotonic() - started}
            (folder / "step.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    rows = Rows.open(work.path / "00-read" / "rows.arrow")
    quarantined = sum(state["notes"]["quarantined"].values())
    show.end("read and clean", len(rows) + quarantined, len(rows), state["seconds"], reused)
    return state["notes"] | {"seconds": state["seconds"]}, rows, fingerprint


def _step(work: Work, name: str, step: Step, rows: Rows, fingerprint: str, show: Progress) -> Done:
    state = work.finished(name, fingerprint)
    reused = state is not None
    if state is None:
        show.begin(step.name, step.title, len(rows))
        started = time.monotonic()
        with work.writing(name) as folder:
            outcome = step.run(rows, show.advance)
            table = outcome.removed.table()
            with pa.OSFile(str(folder / "removed.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            state = {
                "fingerprint": fingerprint,
                "notes": outcome.notes,
                "for_judge": list(outcome.for_judge),
                "left": len(outcome.kept),
                "seconds": time.monotonic() - started,
            }
            (folder / "step.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    removed = Removed.read(work.path / name / "removed.arrow")
    show.end(step.title, len(rows), state["left"], state["seconds"], reused)
    return Done(
        step.name,
        step.title,
        len(rows),
        state["left"],
        removed,
        state["notes"],
        tuple(state["for_judge"]),
        state["seconds"],
        reused,
    )


def _files(sources: Sequence[Source]) -> dict[str, Any]:
    """What tells a changed file: path, size and time of change, as make and rsync take it."""
    found = []
    for source in sources:
        stat = source.path.stat()
        found.append([str(source.path), source.name, source.exempt, stat.st_size, stat.st_mtime_ns])
    return {"files": found}


def _hash(before: str, name: str, options: dict[str, Any]) -> str:
    text = json.dumps([FORMAT, before, name, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.stem + suffix)


def _write(out: Path, read: Path, start: Rows, rows: Rows, done: Sequence[Done], made: report.Report) -> None:
    with replacing(_beside(out, ".quarantine.jsonl")) as part:
        shutil.copyfile(read / "quarantine.jsonl", part)
    with replacing(_beside(out, ".removed.parquet")) as part:
        _write_removed(part, start, done)
    with replacing(_beside(out, ".report.json")) as part:
        part.write_text(json.dumps(made.data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    with replacing(_beside(out, ".report.html")) as part:
        part.write_text(page(made.data), encoding="utf-8")
    if len(rows):
        with replacing(out) as part:
            _write_prompts(part, rows, {number for step in done for number in step.for_judge})


def _write_prompts(path: Path, rows: Rows, for_judge: set[int]) -> None:
    names = ["id", "question", "answer", "solution", "source", "metadata"]
    schema = pa.schema([(name, pa.large_string()) for name in names])
    position = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for frame in rows.batches(*names):
            table = frame.to_arrow()
            metadata = table["metadata"].to_pylist()
            for place in range(len(frame)):
                flagged = '"subquestions"' in metadata[place] or int(rows.numbers[position + place]) in for_judge
                if flagged:  # the trainer may route it by this to a judge
                    metadata[place] = json.dumps(
                        json.loads(metadata[place]) | {"judge": True}, ensure_ascii=False, sort_keys=True
                    )
            position += len(frame)
            columns = [
                pa.array(metadata, pa.large_string()) if name == "metadata" else table[name].cast(pa.large_string())
                for name in names
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _write_removed(path: Path, start: Rows, done: Sequence[Done]) -> None:
    schema = pa.schema(
        [(name, pa.large_string()) for name in ("id", "source", "step", "reason", "partner")]
        + [("score", pa.float64()), ("question", pa.large_string())]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for step in done:
            position = 0
            for frame in start.at(step.removed.numbers).batches("id", "source", "question"):
                some = slice(position, position + len(frame))
                columns = [
                    frame["id"].to_list(),
                    frame["source"].to_list(),
                    [step.name] * len(frame),
                    step.removed.reasons[some].tolist(),
                    step.removed.partners[some].tolist(),
                    step.removed.scores[some],
                    frame["question"].to_list(),
                ]
                writer.write_table(
                    pa.Table.from_arrays(
                        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
                    )
                )
                position += len(frame)
