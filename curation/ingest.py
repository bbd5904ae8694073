"""Step 0: raw files → one Arrow file of cleaned rows, and the quarantine of rows that could not be used.

One pass: a row is read, mapped, cleaned and forgotten; columns of BATCH rows are keyed and hashed together and written. Ids are
`<label>-<number of the row among its label's>`, so they are unique and stay the same as long as the files do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from curation import answers, fields, normalise, readers
from curation.clean import clean
from curation.errors import InputError
from curation.options import Options, Source
from curation.store import BATCH, COLUMNS, parallel_map

KEPT_METADATA = ("difficulty", "level", "type", "subject", "grade", "year", "problem_type")
"""Columns of the raw rows that go into the metadata as they are, where they are short."""


@dataclass(slots=True)
class Tally:
    """What was read. per label: rows read, rows quarantined; flags: how many rows carry each of `clean`'s flags."""

    read: Counter = field(default_factory=Counter)
    quarantined: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    flags: Counter = field(default_factory=Counter)
    maps: dict[str, str] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        return {name: dict(sorted(getattr(self, name).items())) for name in ("read", "quarantined", "reasons", "flags", "maps")}


@dataclass(frozen=True, slots=True)
class Entry:
    """One cleaned row on its way into the table."""

    source: Source
    label: str
    place: str
    found: fields.Found
    answer: str | None
    flags: tuple[str, ...]
    metadata: dict[str, Any]


Quarantine = Callable[[dict[str, str]], None]


def ingest(
    sources: Sequence[Source], options: Options, folder: Path, progress: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Write `rows.arrow` and `quarantine.jsonl` into `folder`; give the notes for the report.

    sources: exempt ones come first in the table, so that what equals them elsewhere is what goes.
    Raises InputError for a file without a single usable row, or whatever `readers.rows` says.
    """
    tally = Tally()
    ordered = sorted(sources, key=lambda source: not source.exempt)
    with (
        (folder / "quarantine.jsonl").open("w", encoding="utf-8") as quarantine,
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, COLUMNS) as writer,
    ):

        def turn_away(record: dict[str, str]) -> None:
            quarantine.write(json.dumps(record, ensure_ascii=False) + "\n")

        rows = entries(ordered, options, tally, turn_away)
        for batch in parallel_map(lambda group: to_batch(group, options.solutions), _grouped(rows), options.threads):
            writer.write_batch(batch)
            progress(batch.num_rows)
    return tally.notes()


def table_of(found: Sequence[tuple[str, str | None]], source: str = "test", **same: Any) -> pa.ipc.RecordBatchFileReader:
    """(question, answer) pairs as an Arrow file in memory, for tests and benchmarks. same: exempt, kind, unfit of all rows."""
    exempt = bool(same.pop("exempt", False))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, COLUMNS) as writer:
        origin = Source(Path(source), source, exempt)
        made = (
            Entry(origin, source, f"row {index}", fields.Found(question, answer, **same), answer, (), {"number": index})
            for index, (question, answer) in enumerate(found, start=1)
        )
        for group in _grouped(made):
            writer.write_batch(to_batch(group, False))
    return pa.ipc.open_file(pa.BufferReader(sink.getvalue()))


def entries(sources: Sequence[Source], options: Options, tally: Tally, turn_away: Quarantine) -> Iterator[Entry]:
    """The usable rows of all sources, in order."""
    numbers: Counter = Counter()
    for source in sources:
        chosen = choose_map(source, options)
        label = label_of(source, chosen)
        tally.maps[str(source.path.name)] = chosen.name
        usable, seen, worst = 0, 0, ""
        for place, raw in readers.rows(source.path, chosen.columns() and chosen.columns() | set(KEPT_METADATA)):
            seen, numbers[label] = seen + 1, numbers[label] + 1
            tally.read[label] += 1
            try:
                entry = _entry(source, label, place, raw, chosen)
            except fields.BadRow as bad:
                tally.quarantined[label] += 1
                tally.reasons[f"{bad.field}: {bad.reason.split(';')[0].split(' (')[0]}"[:80]] += 1
                worst = worst or f"{place}: {bad}"
                turn_away(
                    {"file": str(source.path), "place": place, "field": bad.field, "value": bad.value, "reason": bad.reason}
                )
                continue
            entry.metadata["number"] = numbers[label]
            tally.flags.update(entry.flags)
            usable += 1
            yield entry
        if not usable:
            count = f"none of its {seen:,} rows can be used; the first: {worst}" if worst else "has no rows; leave it out"
            raise InputError(f"{source.path}: {count}")


def choose_map(source: Source, options: Options) -> fields.FieldMap:
    """By the name given with the file, else `--map`, else the columns of its first row."""
    named = fields.by_name(source.name) if source.name else None
    if named is not None:
        return named
    chosen = fields.by_user(options.fields) if options.fields else fields.detect(readers.first_row(source.path), str(source.path))
    readers.check_types(source.path, chosen.question[0].split(".")[0])
    return chosen


def label_of(source: Source, chosen: fields.FieldMap) -> str:
    return source.name or (chosen.name if chosen.named else source.path.stem)


def _entry(source: Source, label: str, place: str, raw: Any, chosen: fields.FieldMap) -> Entry:
    if isinstance(raw, readers.Broken):
        raise fields.BadRow("row", "", raw.reason)
    found = chosen.read(raw)
    cleaned = clean(found.question, found.answer)
    if cleaned.reject:
        raise fields.BadRow("question", found.question, cleaned.reject)
    question = f"{cleaned.question}\n{found.options}" if found.options else cleaned.question
    metadata: dict[str, Any] = {"origin": f"{source.path.name}:{place}"}
    if isinstance(raw, dict):
        metadata |= {
            name: raw[name] for name in KEPT_METADATA if isinstance(raw.get(name), str | int | float) and len(str(raw[name])) < 60
        }
    found = fields.Found(question, cleaned.answer, found.options, found.solution, found.kind, found.unfit)
    return Entry(source, label, place, found, cleaned.answer, cleaned.flags, metadata)


def _grouped(rows: Iterator[Entry]) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for entry in rows:
        group.append(entry)
        if len(group) == BATCH:
            yield group
            group = []
    if group:
        yield group


def to_batch(group: Sequence[Entry], solutions: bool) -> pa.RecordBatch:
    """Key and hash a group of rows as columns."""
    questions = pl.Series([entry.found.question for entry in group], dtype=pl.String)
    keys = pl.select(normalise.key(pl.lit(questions))).to_series()
    found = normalise.tokens(keys)
    exact = normalise.exact_tokens(found)
    given = [fields.chosen_option(entry.answer or "", entry.found.options) for entry in group]
    answer_keys = pl.select(normalise.key(pl.lit(pl.Series(given, dtype=pl.String)))).to_series()
    answer_tokens = normalise.exact_tokens(normalise.tokens(answer_keys))
    texts = {
        "id": [f"{entry.label}-{entry.metadata['number']:06d}" for entry in group],
        "source": [entry.label for entry in group],
        "question": questions,
        "answer": [entry.answer for entry in group],
        "solution": [entry.found.solution if solutions else None for entry in group],
        "metadata": [_metadata(entry) for entry in group],
        "kind": [entry.found.kind for entry in group],
        "unfit": [entry.found.unfit for entry in group],
        "flags": [",".join(entry.flags) for entry in group],
        "exempt": [entry.source.exempt for entry in group],
        "key": keys,
        "exact": normalise.sequence_hashes(exact),
        "exact2": normalise.sequence_hashes(exact, salt=1),
        "answer_value": np.array([answers.as_value(answer) for answer in given]),
        "answer_hash": normalise.sequence_hashes(answer_tokens),
        "answer_numbers": normalise.number_hashes(answer_tokens),
        "content": normalise.content_hashes(found),
        "numbers": normalise.number_hashes(found),
    }
    columns = []
    for name, kind in zip(COLUMNS.names, COLUMNS.types, strict=True):
        values = texts[name]
        columns.append(values.to_arrow().cast(kind) if isinstance(values, pl.Series) else pa.array(values, kind))
    return pa.record_batch(columns, schema=COLUMNS)


def _metadata(entry: Entry) -> str:
    kept = {name: value for name, value in entry.metadata.items() if name != "number" and value == value}
    return json.dumps(kept | ({"flags": list(entry.flags)} if entry.flags else {}), ensure_ascii=False, sort_keys=True)
