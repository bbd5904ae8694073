"""One hand-made row of each public set: found by its columns, read into question and answer."""

import math

import pytest

from curation import fields
from curation.errors import InputError

ROWS = {
    "gsm8k": ({"question": "Q?", "answer": "so 7\n#### 1,234"}, "Q?", "1,234"),
    "math": ({"problem": "Q?", "answer": "7", "type": "Algebra", "difficulty": 5.0}, "Q?", "7"),
    "math-hendrycks": (
        {"problem": "Q?", "solution": r"\boxed{\frac{1}{2}}", "level": "Level 1", "type": "A"},
        "Q?",
        r"\frac{1}{2}",
    ),
    "numinamath": (
        {"problem": "Q?", "answer": "7", "question_type": "math-word-problem", "solution": "s", "problem_is_valid": "Yes"},
        "Q?",
        "7",
    ),
    "numinamath-cot": ({"problem": "Q?", "solution": r"\boxed{7}", "messages": []}, "Q?", "7"),
    "openthoughts": (
        {"system": "s", "conversations": [{"from": "user", "value": "Q?"}, {"from": "assistant", "value": r"<t> \boxed{7}"}]},
        "Q?",
        "7",
    ),
    "openthoughts-metadata": ({"problem": "Q?", "ground_truth_solution": "7", "domain": "math"}, "Q?", "7"),
    "orz": ([{"from": "human", "value": "Q?"}, {"from": "assistant", "ground_truth": {"value": "7"}}], "Q?", "7"),
    "s1k": ({"question": "Q?", "solution": "long … \\boxed{7}", "cot_type": "math"}, "Q?", "7"),
    "limr": ({"context_messages": [{"role": "user", "content": "Q?"}], "answer": "7"}, "Q?", "7"),
    "tal-scq5k": (
        {
            "problem": "Q?",
            "answer_option_list": [[{"aoVal": "A", "content": "7 "}], [{"aoVal": "B", "content": "8"}]],
            "answer_value": "A",
        },
        "Q?",
        "A",
    ),
    "agieval": ({"question": "Q?", "options": ["(A)7", "(B)8"], "label": "B", "answer": None}, "Q?", "B"),
    "gaokao": ({"question": "Q?", "answer": ["A", "C"], "analysis": "x", "category": "c"}, "Q?", "A,C"),
    "cmath": ({"question": "Q?", "golden": "7", "grade": 1}, "Q?", "7"),
    "math23k": ({"original_text": "Q?", "ans": "((3)/(4))", "equation": "x=3/4"}, "Q?", r"\frac{3}{4}"),
    "verl": (
        {
            "prompt": [{"role": "user", "content": r"Q? Let's think step by step and output the final answer within \boxed{}."}],
            "reward_model": {"ground_truth": "7"},
        },
        "Q?",
        "7",
    ),
    "generic": ({"question": "Q?", "final_answer": 27.0}, "Q?", "27"),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_set_is_found_and_read(name: str) -> None:
    row, question, answer = ROWS[name]
    chosen = fields.detect(row, "raw/file.json")
    assert chosen.name == name
    found = chosen.read(row)
    assert (found.question, found.answer) == (question, answer)


@pytest.mark.parametrize(
    ("name", "map_name"),
    [
        ("NuminaMath-1.5", "numinamath"),
        ("GSM8K", "gsm8k"),
        ("ape", "ape210k"),
        ("GAOKAO-Bench", "gaokao"),
        ("DeepScaleR", "deepscaler"),
        ("LIMO", "limo"),
    ],
)
def test_names(name: str, map_name: str) -> None:
    assert fields.by_name(name).name == map_name
    assert fields.by_name("my-label") is None


def test_a_path_decides_between_sets_with_the_same_columns() -> None:
    row = ROWS["math23k"][0]
    assert fields.detect(row, "/raw/APE-210K/train.json").name == "ape210k"


def test_marks() -> None:
    numina = fields.MAPS["numinamath"]
    row = ROWS["numinamath"][0]
    assert numina.read(row | {"synthetic": True}).unfit == "synthetic"
    assert numina.read(row | {"source": "synthetic_math"}).unfit == "synthetic"
    assert numina.read(row | {"source": "olympiads"}).unfit == ""
    assert numina.read(row | {"problem_is_valid": "Incomplete"}).unfit == "invalid"
    assert numina.read(row | {"question_type": "MCQ"}).kind == "choice"
    assert (
        fields.MAPS["openthoughts-metadata"].read(ROWS["openthoughts-metadata"][0] | {"domain": "code"}).unfit == "other_subject"
    )
    assert fields.MAPS["tal-scq5k"].read(ROWS["tal-scq5k"][0]).options == "A. 7\nB. 8"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": None, "answer": "1"}, "question"),
        ({"question": "  ", "answer": "1"}, "question"),
        ({"question": 5, "answer": {"a": 1}}, "answer"),
        ({"question": "q", "answer": math.nan}, "answer"),
        ({"question": "q", "answer": math.inf}, "answer"),
        ({"question": "q", "answer": True}, "answer"),
        ({"question": b"q", "answer": "1"}, "question"),
        ({"question": "x" * 100_001, "answer": "1"}, "question"),
        ({"question": "half \ud800", "answer": "1"}, "question"),
        ({"question": [1, 2], "answer": "1"}, "question"),
    ],
)
def test_bad_rows_say_which_field(row: dict, field: str) -> None:
    with pytest.raises(fields.BadRow) as caught:
        fields.MAPS["generic"].read(row)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


def test_user_map() -> None:
    chosen = fields.by_user({"question": "data.text", "answer": "data.gold.0"})
    found = chosen.read({"data": {"text": "Q?", "gold": ["7", "8"]}})
    assert (found.question, found.answer) == ("Q?", "7")
    with pytest.raises(InputError, match=r"'qestion' is no field; the nearest is 'question'"):
        fields.by_user({"qestion": "a", "answer": "b"})
    with pytest.raises(InputError, match="names no answer"):
        fields.by_user({"question": "a"})


def test_chosen_option() -> None:
    assert fields.chosen_option("B", "A. 7\nB. 8") == "8"
    assert fields.chosen_option("B", "(A) 7\n(B) 8") == "8"
    assert fields.chosen_option("E", "A. 7\nB. 8") == "E"
    assert fields.chosen_option("x", "") == "x"
