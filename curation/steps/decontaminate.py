"""Step 1: remove what the benchmarks ask.

A row is contaminated
- exactly, where its tokens are a benchmark question's, brackets and operators included: so across full-width and half-width
  forms, LaTeX spacing, traditional and simplified characters (`curation.normalise`);
- by overlap, where it has at least the share `overlap` of a benchmark question's n-grams, or where nearly all of ITS n-grams, and
  at least `MOST`, are that question's (an excerpt). n-grams of tokens, so that ten Chinese characters weigh as ten English words.

An n-gram that many benchmark questions share is boilerplate ("Express your answer as a common fraction in lowest terms") and
counts nothing. A benchmark question of fewer than n tokens is looked for exactly. Different numbers in the same sentence do
count as contaminated where enough n-grams agree: here a removal too many costs nothing, one too few spoils an evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from curation import fields, normalise, readers
from curation.clean import clean
from curation.errors import InputError
from curation.ingest import choose_map, label_of
from curation.options import Options, Source
from curation.store import Outcome, Removed, Rows, parallel_map

COMMON = 5
"""An n-gram in more benchmark questions than this is boilerplate."""
MOST = 8
"""n-grams that a row must share, for its own share to count."""
EXCERPT = 0.9
_FILTER_BITS = 24


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """All benchmark questions. ids: their names; exact: sorted (hash, hash2, question) records; grams, gram_of: each n-gram of
    each question, sorted by n-gram; sizes: n-grams of each question that are no boilerplate."""

    ids: list[str]
    exact: dict[tuple[int, int], int]
    grams: np.ndarray
    gram_of: np.ndarray
    sizes: np.ndarray
    filter: np.ndarray


def read_benchmarks(sources: Sequence[Source], options: Options) -> Benchmarks:
    """Raises InputError for a file that cannot be read, or that has no question. A question with options counts with and
    without."""
    ids, texts = [], []
    numbers: Counter = Counter()
    for source in sources:
        chosen = choose_map(source, options)
        label = label_of(source, chosen)
        before = len(ids)
        for _, raw in readers.rows(source.path):
            numbers[label] += 1
            for text in _questions(raw, chosen):
                ids.append(f"{label}-{numbers[label]:06d}")
                texts.append(text)
        if len(ids) == before:
            raise InputError(f"{source.path}: no row has a question for a benchmark; name its column: --map question=…,answer=…")
    return index(ids, texts, options.ngram)


def _questions(raw: object, chosen: fields.FieldMap) -> list[str]:
    if isinstance(raw, readers.Broken):
        return []
    try:
        found = chosen.read(raw)
    except fields.BadRow:
        return []
    question = clean(found.question, found.answer).question
    return [question, f"{question}\n{found.options}"] if found.options else [question]


def index(ids: list[str], texts: list[str], ngram: int) -> Benchmarks:
    keys = pl.select(normalise.key(pl.lit(pl.Series(texts, dtype=pl.String)))).to_series()
    found = normalise.tokens(keys)
    exact = normalise.exact_tokens(found)
    hashes = zip(normalise.sequence_hashes(exact).tolist(), normalise.sequence_hashes(exact, salt=1).tolist(), strict=True)
    first: dict[tuple[int, int], int] = {}
    for number, pair in enumerate(hashes):
        first.setdefault(pair, number)
    bare = normalise.bare(found)
    grams, starts = normalise.ngrams(bare, ngram)
    owner = np.repeat(np.arange(len(texts)), np.diff(starts))
    long_enough = np.diff(bare.starts)[owner] >= ngram
    _, place, count = np.unique(grams, return_inverse=True, return_counts=True)
    counts = long_enough & (count[place] <= COMMON)
    grams, owner = grams[counts], owner[counts]
    order = np.argsort(grams, kind="stable")
    mask = np.zeros(1 << _FILTER_BITS, bool)
    mask[grams >> np.uint32(32 - _FILTER_BITS)] = True
    return Benchmarks(ids, first, grams[order], owner[order], np.bincount(owner, minlength=len(texts)), mask)


def decontaminate(
    rows: Rows, benchmarks: Benchmarks, options: Options, progress: Callable[[int], None] = lambda _: None
) -> Outcome:
    """Reasons: `exact`, `overlap`; partner: the benchmark question; score: the share of n-grams. Exempt rows are checked too."""
    numbers, reasons, partners, scores = [], [], [], []
    position = 0
    found = parallel_map(
        lambda frame: _check(frame, benchmarks, options), rows.batches("exact", "exact2", "key"), options.threads
    )
    for size, hits in found:
        for place, (reason, partner, score) in sorted(hits.items()):
            numbers.append(int(rows.numbers[position + place]))
            reasons.append(reason)
            partners.append(benchmarks.ids[partner])
            scores.append(score)
        position += size
        progress(size)
    removed = Removed.of(numbers, reasons, partners, scores)
    return Outcome.without(rows, removed, {"benchmark_questions": len(set(benchmarks.ids))})


def _check(frame: pl.DataFrame, benchmarks: Benchmarks, options: Options) -> tuple[int, dict[int, tuple[str, int, float]]]:
    hits: dict[int, tuple[str, int, float]] = {}
    if not benchmarks.ids:
        return len(frame), hits
    starts, row, question, shared = _shared(frame["key"], benchmarks, options.ngram)
    own = np.diff(starts)[row]
    share = shared / np.maximum(benchmarks.sizes[question], 1)
    own_share = np.where(shared >= MOST, shared / np.maximum(own, 1), 0.0)
    score = np.maximum(share, np.where(own_share >= EXCERPT, own_share, 0.0))
    for place in np.lexsort((question, -score)):  # the best partner first, the earliest among equals
        if score[place] >= options.overlap:
            hits.setdefault(int(row[place]), ("overlap", int(question[place]), round(float(score[place]), 4)))
    for place, pair in enumerate(zip(frame["exact"].to_list(), frame["exact2"].to_list(), strict=True)):
        if pair in benchmarks.exact:
            hits[place] = ("exact", benchmarks.exact[pair], 1.0)
    return len(frame), hits


def _shared(keys: pl.Series, benchmarks: Benchmarks, ngram: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(each row's places in its n-grams; then for each pair that shares an n-gram: row, benchmark question, n-grams shared)."""
    grams, starts = normalise.ngrams(normalise.bare(normalise.tokens(keys)), ngram)
    maybe = np.flatnonzero(benchmarks.filter[grams >> np.uint32(32 - _FILTER_BITS)])
    low = np.searchsorted(benchmarks.grams, grams[maybe], "left")
    high = np.searchsorted(benchmarks.grams, grams[maybe], "right")
    rows = np.searchsorted(starts, maybe, "right") - 1
    counts = high - low
    places = np.repeat(low - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) + np.arange(counts.sum())
    pairs = np.repeat(rows, counts).astype(np.int64) * max(len(benchmarks.ids), 1) + benchmarks.gram_of[places]
    pair, shared = np.unique(pairs, return_counts=True)
    return starts, pair // max(len(benchmarks.ids), 1), pair % max(len(benchmarks.ids), 1), shared
