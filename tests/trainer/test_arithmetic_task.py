"""Problems for a small pretrained model: disjoint, the same ones each time, and a teacher as careless as it says."""

import json
import random

import pytest

from trainer.arithmetic_task import PARTS, careless_solution, partial_sums, write_problems


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arithmetic")
    write_problems(folder, 3)
    return {part: [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()] for part in PARTS}


def test_no_problem_stands_in_two_files_and_none_goes_below_zero(parts):
    assert {part: len(rows) for part, rows in parts.items()} == PARTS
    questions = [row["question"] for rows in parts.values() for row in rows]
    assert len(set(questions)) == len(questions)
    for row in (*parts["train"], *parts["heldout"]):
        sums = partial_sums(row["metadata"]["metadata"]["expression"])
        assert min(sums) >= 0
        assert str(sums[-1]) == row["answer"], "reasoning-gym's own answer"


def test_the_same_seed_gives_the_same_problems(parts, tmp_path):
    write_problems(tmp_path, 3)
    assert [json.loads(line) for line in (tmp_path / "warmup.jsonl").read_text().splitlines()] == parts["warmup"]


def test_the_teacher_goes_on_from_what_it_miscounted(parts):
    solution, answer = careless_solution("4 + 7 - 9", random.Random(0))
    first, second = solution.split("\n")
    assert first.startswith("4 + 7 = ")
    assert second.startswith(f"{first.split()[-1]} - 9 = ")
    assert second.endswith(answer)
    right = sum(row["answer"] == row["metadata"]["answer"] for row in parts["warmup"]) / len(parts["warmup"])
    assert 0.5 < right < 0.7, "0.7 for one line and 0.49 for two, half of each"
