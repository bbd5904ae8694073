"""The demo's promises are checks that can fail, and what it starts from is sound: no held-out problem is in training, and ground
truths are reasoning-gym's own: only the teacher of the warm-up miscounts."""

import json
import random

import pytest

from rollout.errors import InputError
from trainer.demo import main, verdict
from trainer.demo_task import PARTS, worked_solution, write_problems


def test_another_run_folder_is_refused_and_left_alone(tmp_path):
    kept = tmp_path / "data" / "mine.jsonl"
    kept.parent.mkdir()
    kept.write_text("precious")
    with pytest.raises(InputError, match="clears its run folder"):
        main([f"run={tmp_path}"])
    assert kept.read_text() == "precious"


def summary(first: float, last: float, entropy: float) -> dict:
    return {
        "evaluations": [{"name": "heldout", "first": {"pass_at_1": first}, "last": {"pass_at_1": last}}],
        "entropy": {"mean": entropy, "target": 0.55, "steps": 8},
    }


@pytest.mark.parametrize(
    ("first", "last", "entropy", "code", "said"),
    [
        (0.40, 0.56, 0.64, 0, ""),
        (0.40, 0.54, 0.55, 1, "rose by 0.140"),
        (0.40, 0.60, 0.66, 1, "0.110 from the target"),
        (0.40, 0.60, 0.44, 1, "0.110 from the target"),
        (0.60, 0.40, 0.10, 1, "rose by -0.200"),
    ],
)
def test_verdict(first, last, entropy, code, said, capsys):
    assert verdict(summary(first, last, entropy)) == code
    assert said in capsys.readouterr().err


def test_worked_solution_without_slips_is_true():
    text, answer = worked_solution("4 + 7 - 9 - 8", random.Random(0), slip_rate=0.0)
    assert answer == "-6"
    lines = text.splitlines()
    bodies = [line.split() for line in lines]
    assert [body[-5:-2] + body[-1:] for body in bodies] == [
        ["4", "+", "7", "11"],
        ["11", "-", "9", "2"],
        ["2", "-", "8", "-6"],
    ]


def test_problems_are_disjoint_and_solved(tmp_path):
    write_problems(tmp_path, seed=3)
    rows = {part: [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()] for part in PARTS}
    assert {part: len(rows[part]) for part in PARTS} == PARTS
    questions = [row["question"] for part in PARTS for row in rows[part]]
    assert len(set(questions)) == len(questions)
    wrong = 0
    for row in rows["warmup"]:
        assert row["solution"].splitlines()[-1].split()[-1] == row["answer"]
        wrong += row["answer"] != row["metadata"]["answer"]
    assert 0.3 < wrong / len(rows["warmup"]) < 0.6  # a careless teacher, not a hopeless one
    assert all(row["answer"] == row["metadata"]["answer"] for part in ("train", "heldout") for row in rows[part])
