"""Step 4: fuzzy de-duplication by Jaccard similarity J(A, B) = |A ∩ B| / |A ∪ B| of sets of shingles (runs of 3 tokens).

1. MinHash (Broder 1997): signatures whose entries agree with probability J. Entry p is the least of a_p·s + b_p mod 2^32 over
   the shingles s; with a_p odd that is a permutation of the 32-bit numbers, and the shingles are mixed already, so these linear
   ones do.
2. Banded LSH (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4): b bands of r entries; a pair is a candidate where
   one whole band agrees, with probability 1 − (1 − J^r)^b. With b = 25, r = 5 that is 99.995 % at J = 0.8, 99.1 % at 0.7, 55 %
   at 0.5.
3. Candidates are verified by their true Jaccard similarity, so that no row is removed by an estimate.

Greedy, in the table's order: a row is removed where it is near to an earlier row that STAYS. So each removed row has a partner
in the output, and a chain A ~ B ~ C does not remove C for the sake of B. That order does not vectorise: it is one loop in
Numba. So are the signatures; a native library was tried for them, but it hands them over as Python lists, which takes ten times
the making.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import polars as pl

from curation import normalise
from curation.options import Options
from curation.steps.pairs import Answers, ids_of, two_questions
from curation.store import Outcome, Removed, Rows, parallel_map

CROWD = 512
"""Kept rows of one bucket that a new row is compared with: the latest. A bucket fills so only with one form of question in
hundreds of dissimilar versions; without a bound those would cost their square."""


def remove_fuzzy(rows: Rows, options: Options, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Reason: `near`; partner: the row kept; score: their true Jaccard similarity. Exempt rows stay.

    Notes: candidates compared, and pairs that were near but two questions by their answers (`curation.steps.pairs`)."""
    shingles, starts, bands = _sketch(rows, options, progress)
    buckets_of, bucket_starts, sizes = _buckets(bands)
    answers = Answers.of(rows, options.texts_alone)
    partner, score, counts = _greedy(
        shingles, starts, buckets_of, bucket_starts, sizes, rows.column("exempt"), *answers.columns(),
        options.fuzzy_threshold, CROWD,
    )  # fmt: skip
    gone = np.flatnonzero(partner >= 0)
    removed = Removed.of(rows.numbers[gone], "near", ids_of(rows, rows.numbers[partner[gone]]), np.round(score[gone], 4))
    notes = {"compared": int(counts[0]), "near_but_two_questions": int(counts[1])}
    return Outcome.without(rows, removed, notes)


def _sketch(rows: Rows, options: Options, progress: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint32 shingles of all rows, int64[n+1] starts, uint32[n, b] band hashes)."""
    shingles, lengths, bands = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)], [np.zeros((0, options.bands), np.uint32)]
    sketched = parallel_map(lambda frame: sketch(frame["key"], options), rows.batches("key"), options.threads)
    for found, starts, band in sketched:
        shingles.append(found)
        lengths.append(np.diff(starts))
        bands.append(band)
        progress(len(band))
    return np.concatenate(shingles), np.concatenate(([0], np.cumsum(np.concatenate(lengths)))), np.concatenate(bands)


def sketch(keys: pl.Series, options: Options) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint32 shingles, int64[n+1] starts, uint32[n, b] band hashes) of some keys."""
    shingles, starts = normalise.ngrams(normalise.bare(normalise.tokens(keys)), options.shingle)
    size = options.bands * options.band_rows
    chance = np.random.default_rng(options.seed)
    factors, terms = (chance.integers(0, 2**32, size, dtype=np.uint32) for _ in range(2))
    signatures = signatures_of(shingles, starts, factors | np.uint32(1), terms).astype(np.uint64)
    grouped = signatures.reshape(len(keys), options.bands, options.band_rows)
    band = np.zeros(grouped.shape[:2], np.uint64)
    for entry in range(options.band_rows):
        band = normalise.mix(band + grouped[:, :, entry])
    return shingles, starts, (band >> np.uint64(32)).astype(np.uint32)


@numba.njit(cache=True, nogil=True)
def signatures_of(shingles, starts, factors, terms):
    """uint32[n, p]: each row's MinHash signature; all ones for a row without shingles. The inner loop is what the compiler
    turns into vector instructions: one shingle against all permutations."""
    rows = len(starts) - 1
    signatures = np.empty((rows, len(factors)), np.uint32)
    for row in range(rows):
        least = signatures[row]
        least[:] = np.uint32(0xFFFFFFFF)
        for place in range(starts[row], starts[row + 1]):
            shingle = shingles[place]
            for entry in range(len(factors)):
                value = np.uint32(shingle * factors[entry] + terms[entry])
                if value < least[entry]:
                    least[entry] = value
    return signatures


def _buckets(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int32[m] bucket of each row that shares one, row by row; int64[n+1] each row's places in it; int32 sizes of the buckets).
    Buckets of a single row are left out: most are."""
    rows, buckets, sizes, begun = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for band in bands.T:
        _, bucket, count = np.unique(band, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(count[bucket] > 1)
        renumber = np.cumsum(count > 1) - 1
        rows.append(shared)
        buckets.append(renumber[bucket[shared]] + begun)
        sizes.append(count[count > 1])
        begun += len(sizes[-1])
    row, bucket = np.concatenate(rows), np.concatenate(buckets)
    order = np.argsort(row, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(bands)))))
    return bucket[order].astype(np.int32), starts, np.concatenate(sizes).astype(np.int32)


@numba.njit(cache=True, nogil=True)
def _jaccard(left, right, threshold):
    """The Jaccard similarity of two ascending arrays without repeats, or -1 as soon as it is sure to be below the threshold."""
    total = len(left) + len(right)
    if min(len(left), len(right)) < threshold * max(len(left), len(right)) or total == 0:
        return -1.0
    # J ≥ t exactly where the intersection is at least t / (1 + t) of the two sizes together; what may still be missed is the
    # slack.
    slack_left = len(left) - threshold / (1.0 + threshold) * total + 1e-6
    slack_right = len(right) - threshold / (1.0 + threshold) * total + 1e-6
    i = j = common = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            common += 1
            i += 1
            j += 1
        elif left[i] < right[j]:
            i += 1
            if i - common > slack_left:
                return -1.0
        else:
            j += 1
            if j - common > slack_right:
                return -1.0
    return common / (total - common)


@numba.njit(cache=True, nogil=True)
def _greedy(shingles, starts, buckets_of, bucket_starts, sizes, exempt, value, text, numbers, content, threshold, crowd):
    """(partner: int64[n], the kept row that removes this one, or -1; score: float64[n]; counts: compared, near but two
    questions)."""
    rows = len(starts) - 1
    partner = np.full(rows, -1, np.int64)
    score = np.full(rows, np.nan)
    counts = np.zeros(2, np.int64)
    compared_with = np.full(rows, -1, np.int64)
    begin = np.zeros(len(sizes) + 1, np.int64)
    begin[1:] = np.cumsum(sizes)
    members = np.empty(begin[-1], np.int64)
    filled = np.zeros(len(sizes), np.int64)
    for row in range(rows):
        own = shingles[starts[row] : starts[row + 1]]
        buckets = buckets_of[bucket_starts[row] : bucket_starts[row + 1]]
        if not exempt[row]:
            for bucket in buckets:
                last = begin[bucket] + filled[bucket]
                for place in range(last - 1, max(begin[bucket], last - crowd) - 1, -1):
                    other = members[place]
                    if compared_with[other] == row:
                        continue
                    compared_with[other] = row
                    counts[0] += 1
                    similarity = _jaccard(own, shingles[starts[other] : starts[other + 1]], threshold)
                    if similarity < threshold:
                        continue
                    if two_questions(
                        value[row],
                        value[other],
                        text[row],
                        text[other],
                        numbers[row],
                        numbers[other],
                        content[row],
                        content[other],
                    ):
                        counts[1] += 1
                        continue
                    if partner[row] < 0 or similarity > score[row] or (similarity == score[row] and other < partner[row]):
                        partner[row] = other
                        score[row] = similarity
                if partner[row] >= 0:
                    break
        if partner[row] < 0:
            for bucket in buckets:
                members[begin[bucket] + filled[bucket]] = row
                filled[bucket] += 1
    return partner, score, counts
