"""Step 3: exact de-duplication. Two questions are one where their tokens are (`curation.normalise`): form of characters, spaces,
LaTeX styling and prose punctuation left aside, brackets and operators not. The first row stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from curation.steps.pairs import Answers, ids_of
from curation.store import Outcome, Removed, Rows


def remove_exact(rows: Rows, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Reasons: `same`, or `same_other_answer` where the two answers differ: one of them is wrong, or the question is incomplete.
    partner: the row kept. Exempt rows stay."""
    records = np.empty(len(rows), dtype=[("exact", np.uint64), ("exact2", np.uint64)])
    records["exact"], records["exact2"] = rows.column("exact"), rows.column("exact2")
    order = np.argsort(records, kind="stable", order=("exact", "exact2"))
    new = np.ones(len(rows), bool)
    new[1:] = records[order][1:] != records[order][:-1]
    leader = np.empty(len(rows), np.int64)
    leader[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]  # the sort is stable, so each group begins with its first row
    gone = np.flatnonzero((leader != np.arange(len(rows))) & ~rows.column("exempt"))
    answers = Answers.of(rows)
    differs = answers.differ(gone, leader[gone])
    reasons = np.where(differs, "same_other_answer", "same").astype(object)
    removed = Removed.of(rows.numbers[gone], reasons, ids_of(rows, rows.numbers[leader[gone]]), 1.0)
    progress(len(rows))
    return Outcome.without(rows, removed, {"other_answers": int(differs.sum())})
