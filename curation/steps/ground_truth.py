"""Step 2: remove synthetic data and data without ground truth.

The set's own marks count (NuminaMath's `synthetic` and `*_is_valid`, OpenThoughts' `domain`), and an answer that is missing,
blank or a word that stands for none (N/A, 略, 见解析). A proof's "proof" is left to the step on question types. What is
synthetic but not marked so cannot be told from its text, and stays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from curation.answers import is_placeholder
from curation.store import Outcome, Removed, Rows


def remove_without_truth(rows: Rows, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Reasons: `synthetic`, `invalid`, `other_subject` (by the set's marks), `no_answer`. Exempt rows stay; without an answer
    they are for the judge."""
    reasons = np.full(len(rows), "", object)
    judged = []
    position = 0
    for frame in rows.batches("unfit", "answer", "exempt"):
        for place, (unfit, answer, exempt) in enumerate(frame.iter_rows(), start=position):
            missing = is_placeholder(answer)
            if exempt:
                if missing:
                    judged.append(int(rows.numbers[place]))
            elif unfit or missing:
                reasons[place] = unfit or "no_answer"
        position += len(frame)
        progress(len(frame))
    gone = reasons != ""
    return Outcome.without(rows, Removed.of(rows.numbers[gone], reasons[gone]), for_judge=judged)
