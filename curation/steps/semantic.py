"""Step 5: semantic de-duplication: k-means over embeddings, then cosine similarity inside each cluster, one of a close pair
removed (Abbas et al. 2023, SemDeDup, arXiv 2303.09540; the paper's way).

k = √n clusters: assigning n rows to k centres costs n·k, comparing inside clusters n·n/k; at √n the two are alike. The centres
are fitted on a sample (scikit-learn's MiniBatchKMeans). A near pair that a border cuts is compared all the same, in the cluster
that is the second nearest of one: each row is looked at in its two nearest clusters.

Inside a cluster it is greedy, in the table's order, as the fuzzy step is: a row goes where it is near to an earlier row that
stays. Near in meaning is not the same in mathematics, so the answers have their say (`curation.steps.pairs`).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from curation.embed import Embed, embedder
from curation.normalise import mix
from curation.options import Options
from curation.steps.pairs import Answers, ids_of
from curation.store import Outcome, Removed, Rows, parallel_map

SAMPLE_PER_CENTRE = 64
BLOCK = 512
"""Rows of a cluster compared at once with the rows kept so far."""
NEAREST = 2


@dataclass(frozen=True, slots=True)
class Judges:
    """What has a say beside the cosine: the answers; groups: uint64[n], rows of different groups are two questions whatever their
    cosine; exempt: bool[n], whether a row may go at all."""

    answers: Answers
    groups: np.ndarray
    exempt: np.ndarray

    @classmethod
    def of(cls, rows: Rows, texts_alone: bool) -> Judges:
        """An embedding hardly sees numbers, so a group has the same digits; where there are none, the same answer."""
        answers, digits = Answers.of(rows, texts_alone), rows.column("numbers")
        groups = np.zeros_like(digits) if texts_alone else np.where(digits != 0, digits, mix(answers.text))
        return cls(answers, groups, rows.column("exempt"))


def remove_semantic(rows: Rows, options: Options, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Reason: `meaning`; partner: the row kept; score: the cosine. Exempt rows stay. Only rows that share a group with another
    are embedded at all."""
    _, group, size = np.unique(Judges.of(rows, options.texts_alone).groups, return_inverse=True, return_counts=True)
    shared = rows.keep(size[group] > 1)
    progress(len(rows) - len(shared))
    if len(shared) < 2:
        return Outcome.without(rows, Removed.of([], ""), {"compared": len(shared)})
    with threadpool_limits(1):  # sums in BLAS depend on its threads; ours run over batches and clusters instead
        vectors = _embed_all(shared, embedder(rows, options), options, progress)
        nearest = assign(vectors, options)
        partner, score, spared = _compare(vectors, nearest, Judges.of(shared, options.texts_alone), options)
    gone = np.flatnonzero(partner >= 0)
    partners = ids_of(shared, shared.numbers[partner[gone]])
    removed = Removed.of(shared.numbers[gone], "meaning", partners, np.round(score[gone], 4))
    notes = {"compared": len(shared), "clusters": int(nearest.max()) + 1, "near_but_two_questions": spared}
    return Outcome.without(rows, removed, notes)


def _embed_all(rows: Rows, embed: Embed, options: Options, progress: Callable[[int], None]) -> np.ndarray:
    """float32[n, d]."""
    parts = []
    for part in parallel_map(embed, rows.batches("key", "question"), options.threads):
        parts.append(part)
        progress(len(part))
    return np.concatenate(parts)


def assign(vectors: np.ndarray, options: Options) -> np.ndarray:
    """int32[n, 2]: each row's two nearest of √n centres, the nearest first (the same twice where there is one centre)."""
    count = max(1, round(len(vectors) ** 0.5))
    size = min(len(vectors), max(count * SAMPLE_PER_CENTRE, 4096))
    sample = vectors[:: max(1, len(vectors) // size)]
    means = MiniBatchKMeans(count, batch_size=4096, n_init=1, max_iter=20, random_state=options.seed, reassignment_ratio=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than centres is no trouble here
        centres = means.fit(sample).cluster_centers_.astype(np.float32)
    half_norms = 0.5 * np.einsum("kd,kd->k", centres, centres)

    def closest(begin: int) -> np.ndarray:
        closeness = vectors[begin : begin + 4096] @ centres.T - half_norms
        if count == 1:
            return np.zeros((len(closeness), NEAREST), np.int32)
        two = np.argpartition(-closeness, 1, axis=1)[:, :NEAREST]
        ordered = np.take_along_axis(closeness, two, axis=1)
        return np.where(ordered[:, :1] >= ordered[:, 1:], two, two[:, ::-1]).astype(np.int32)

    return np.concatenate(list(parallel_map(closest, range(0, len(vectors), 4096), options.threads)))


def _compare(vectors: np.ndarray, nearest: np.ndarray, judges: Judges, options: Options) -> tuple[np.ndarray, np.ndarray, int]:
    """(partner: int64[n], the earlier row that removes this one, or -1; its cosine; near pairs that are two questions).

    Clusters are compared alone, so a row may be removed in one of its two and stand in the other as another's partner. Those
    few are decided after, in the table's order: a row whose partners all went stays."""
    rows, columns = np.nonzero(np.ones_like(nearest, bool))
    cluster = nearest[rows, columns]
    keep = (columns == 0) | (cluster != nearest[rows, 0])
    rows, cluster = rows[keep], cluster[keep]
    order = np.lexsort((rows, cluster))
    bounds = np.flatnonzero(np.diff(cluster[order], prepend=-1, append=-1))
    members = [order[low:high] for low, high in itertools.pairwise(bounds)]
    found = parallel_map(
        lambda member: near_pairs(vectors, rows[member], judges, options.semantic_threshold), members, options.threads
    )
    pairs: dict[int, list[tuple[float, int]]] = {}
    spared = 0
    for late, early, cosine, two in found:
        spared += two
        for row, other, similarity in zip(late.tolist(), early.tolist(), cosine.tolist(), strict=True):
            pairs.setdefault(row, []).append((-similarity, other))
    partner, score = np.full(len(vectors), -1, np.int64), np.full(len(vectors), np.nan)
    for row in sorted(pairs):
        standing = sorted(pair for pair in set(pairs[row]) if partner[pair[1]] < 0)
        if standing:
            score[row], partner[row] = -standing[0][0], standing[0][1]
    return partner, score, spared


def near_pairs(
    vectors: np.ndarray, rows: np.ndarray, judges: Judges, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(late, early, cosine) of near pairs among `rows` (ascending), whose late row is not exempt; and how many near pairs are two
    questions. Each row is compared with those that stay before its block and with all of its block."""
    late, early, cosine = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    _, group, size = np.unique(judges.groups[rows], return_inverse=True, return_counts=True)
    rows = rows[size[group] > 1]
    standing = np.zeros(0, np.int64)
    spared = 0
    for begin in range(0, len(rows), BLOCK):
        block = rows[begin : begin + BLOCK]
        others = np.concatenate((standing, block))
        similarity = vectors[block] @ vectors[others].T
        near = (similarity >= threshold) & (judges.groups[block][:, None] == judges.groups[others][None, :])
        left, right = np.nonzero(near)
        candidate = (others[right] < block[left]) & ~judges.exempt[block[left]]
        left, right = left[candidate], right[candidate]
        two = judges.answers.differ(block[left], others[right])
        spared += int(two.sum())
        left, right = left[~two], right[~two]
        late.append(block[left])
        early.append(others[right])
        cosine.append(similarity[left, right])
        standing = np.concatenate((standing, np.setdiff1d(block, _greedily_removed(block[left], others[right]))))
    return np.concatenate(late), np.concatenate(early), np.concatenate(cosine), spared


def _greedily_removed(late: np.ndarray, early: np.ndarray) -> np.ndarray:
    """Of the late rows (ascending), those near to a row that is not itself removed."""
    removed: set[int] = set()
    for row, other in zip(late.tolist(), early.tolist(), strict=True):
        if other not in removed:
            removed.add(row)
    return np.array(sorted(removed), np.int64)
