"""The repetition filter on real outputs, against what a reader says of them (repetition_labels.csv), against zlib, and against
solutions that people wrote. The limits were chosen on the labelled outputs; the solutions were looked at afterwards."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from real_outputs import data, outputs, qwen

from benchmarks.reward import solutions_by_people
from benchmarks.reward_traces import LOOP_RATIO, labels, zlib_ratio
from rollout.reward.repetition import RepetitionDetector, RepetitionLimits


@pytest.fixture(scope="module")
def caught():
    tokenizer = qwen()
    detector = RepetitionDetector(RepetitionLimits(), tokenizer.get_vocab())

    def why(text: str) -> str | None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return detector(np.asarray(ids, dtype=np.int32))

    return why


def test_the_table_is_of_the_data():
    labelled = labels()
    assert set(labelled) <= {part.key for part in outputs()}
    assert set(labelled.values()) == {"loop", "clean", "borderline"}
    assert len(labelled) >= 120
    assert {source for source, _, _ in labelled} == {part.source for part in outputs()}


def test_precision_and_recall_over_what_was_read(caught):
    labelled = labels()
    counts: Counter[tuple[str, bool]] = Counter()
    for part in outputs():
        if part.key in labelled:
            counts[labelled[part.key], caught(part.text) is not None] += 1
    right, false, lost = counts["loop", True], counts["clean", True], counts["loop", False]
    assert right / (right + false) >= 0.97, f"precision: {dict(counts)}"
    assert right / (right + lost) >= 0.97, f"recall: {dict(counts)}"
    assert false < 0.01 * (false + counts["clean", False])


def test_every_loop_that_zlib_sees_is_caught_with_its_place(caught):
    loops = [part for part in outputs() if zlib_ratio(part.text) < LOOP_RATIO]
    assert len(loops) > 20
    reasons = {part.key: caught(part.text) for part in loops}
    assert [key for key, why in reasons.items() if why is None] == []
    assert [why for why in reasons.values() if "tokens " not in why] == []


def test_few_solutions_by_people_are_caught(caught):
    texts = list(itertools.islice(solutions_by_people(data()), 7000, None, 2))
    assert len(texts) > 2000
    assert sum(caught(text) is not None for text in texts) < 0.005 * len(texts)
