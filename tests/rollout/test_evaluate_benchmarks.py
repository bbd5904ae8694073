"""Every benchmark as its files are published: real ones where they are at hand, the public format by hand where they are not."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rollout.errors import InputError
from rollout.evaluate.benchmarks import KNOWN, load, parse_names

ROOT = Path(__file__).parents[2]
DATA = ROOT / os.environ.get("KEJU_TEST_DATA", "../shared/data")


def real(path):
    found = DATA / path
    if not found.exists():
        pytest.skip(f"no test data at {found} (set KEJU_TEST_DATA)")
    return found


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "path", "size", "k", "answers"), [
    ("math500", "eval_competition/math500.jsonl", 500, 64, {0: r"\left( 3, \frac{\pi}{2} \right)", 1: "p - q"}),
    ("aime2024", "eval_competition/aime24.parquet", 30, 64, {0: "204"}),
    ("amc2023", "eval_competition/amc23.jsonl", 40, 50, {0: "27", 1: "36"}),
    ("gaokao", "gaokao_bench", 599, 3, {0: "$x^{2}+y^{2}=2$"}),
    ("tal-scq5k", "tal_scq5k/ch_single_choice_train_3K.jsonl", 3000, 1, {0: "B"}),
    ("agieval-mathqa", "agieval/gaokao-mathqa.jsonl", 351, 6, {0: "D"}),
    ("agieval-mathcloze", "agieval/gaokao-mathcloze.jsonl", 118, 17, {0: "2", 1: "$5$;$10$"}),
    ("gsm8k", "gsm8k/train.jsonl", 7473, 1, {0: "72", 1: "10"}),
])  # fmt: skip
def test_real_files_are_read_whole(name, path, size, k, answers):
    benchmark = load(name, real(path), None)
    assert (benchmark.size, len(benchmark.prompts), benchmark.k) == (size, size, k)
    for place, answer in answers.items():
        assert benchmark.prompts[place].answer == answer
    assert len({prompt.id for prompt in benchmark.prompts}) == size
    assert all(prompt.question.strip() and prompt.answer.strip() for prompt in benchmark.prompts)
    assert all("\\boxed{}" not in prompt.question for prompt in benchmark.prompts), "the file's own instruction is not ours"


def test_real_files_are_found_below_a_data_folder():
    real("eval_competition")
    for name, size in (("math500", 500), ("aime2024", 30), ("amc2023", 40), ("gaokao", 599)):
        assert load(name, None, DATA).size == size
    with pytest.raises(InputError, match=r"gsm8k: no file below .* get it \(github.com/openai"):
        load("gsm8k", None, DATA)  # the training split lies there, and is not taken for the test split


def test_real_choices_show_each_option_once_and_want_a_letter():
    tal = load("tal-scq5k", real("tal_scq5k/ch_single_choice_train_3K.jsonl"), None)
    assert tal.prompts[0].question.splitlines()[-5:] == [
        "A. $$2$$",
        "B. $$3$$",
        "C. $$4$$",
        "D. $$5$$",
        "请只以正确选项的字母作答。",
    ]
    assert tal.prompts[0].metadata == {"choice": True}
    assert set("".join(prompt.answer for prompt in tal.prompts)) <= set("ABCDEFGH")
    agieval = load("x", real("agieval/gaokao-mathqa.jsonl"), None)
    assert agieval.prompts[0].question.count("(A)") == 1
    assert {"AD", "ABD", "BCD"} <= {prompt.answer for prompt in agieval.prompts}
    gaokao = load("gaokao", real("gaokao_bench"), None)
    assert sum(bool(prompt.metadata) for prompt in gaokao.prompts) == 218 + 214
    assert all(len(prompt.answer) == 1 for prompt in gaokao.prompts if prompt.metadata)


def test_choices_by_hand(tmp_path):
    options = [[{"aoVal": "A", "content": "$$1$$ "}], [{"aoVal": "B", "content": "$$2$$ "}]]
    tal = {"problem": "几位？", "answer_option_list": options, "answer_value": "B", "answer_analysis": ["略"]}
    write(tmp_path / "tal" / "ch_single_choice_test_2K.jsonl", [tal])
    prompt = load("tal-scq5k", None, tmp_path).prompts[0]
    assert prompt.question.splitlines() == ["几位？", "A. $$1$$", "B. $$2$$", "请只以正确选项的字母作答。"]
    assert (prompt.answer, prompt.metadata) == ("B", {"choice": True})
    agieval = {"question": "Which?", "options": ["(A)one", "(B)two", "(C)three"], "label": "C A", "answer": None}
    prompt = load("x", write(tmp_path / "agieval.jsonl", [agieval]), None).prompts[0]
    assert prompt.question.splitlines()[:4] == ["Which?", "(A)one", "(B)two", "(C)three"]
    assert (prompt.answer, prompt.metadata) == ("AC", {"choice": True})


def test_gsm8k_in_both_public_forms(tmp_path):
    row = {"question": "16 eggs, 7 gone, $2 each?", "answer": "16 - 7 = <<16-7=9>>9\n9 * 2 = $<<9*2=18>>18\n#### 1,018"}
    path = write(tmp_path / "gsm8k" / "test.jsonl", [row] * 3)
    benchmark = load("gsm8k", None, tmp_path)
    assert [prompt.answer for prompt in benchmark.prompts] == ["1,018"] * 3
    assert benchmark.prompts[0].question == row["question"]
    path.unlink()
    (tmp_path / "gsm8k" / "main").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "gsm8k" / "main" / "test-00000-of-00001.parquet")
    assert load("gsm8k", None, tmp_path).size == 1


def test_cmath(tmp_path):
    rows = [{"grade": 1, "question": "3 加 4 得几?", "golden": "7"}, {"grade": 6, "question": "一半?", "golden": 0.5}]
    write(tmp_path / "cmath" / "cmath_dev.jsonl", rows * 2)
    write(tmp_path / "cmath" / "cmath_test.jsonl", rows)
    benchmark = load("cmath", None, tmp_path)
    assert [prompt.answer for prompt in benchmark.prompts] == ["7", "0.5"]
    assert benchmark.k == 1000
    assert load("cmath", tmp_path / "cmath", None).digest == benchmark.digest


def test_mathbench_is_its_three_school_levels(tmp_path):
    choice = {"question": "1 + 1 = ?", "options": ["1", "2", "3", "4"], "answer": "B", "topic": "sums"}
    cloze = {"question": "小明有 3 个苹果，又买 4 个，共几个？", "answer": "7", "topic": "加法"}
    folder = tmp_path / "mathbench_v1"
    for level in ("middle", "high", "college"):
        write(folder / level / "single_choice_en.jsonl", [choice])
    write(folder / "primary" / "cloze_cn.jsonl", [cloze])
    write(folder / "primary_knowledge" / "single_choice_cn.jsonl", [choice])
    benchmark = load("mathbench-k12", None, tmp_path)
    assert [prompt.answer for prompt in benchmark.prompts] == ["B", "B", "7"]
    assert benchmark.prompts[0].question.splitlines() == [
        "1 + 1 = ?", "A. 1", "B. 2", "C. 3", "D. 4", "Give only the letter of the right option as the answer.",
    ]  # fmt: skip
    assert benchmark.prompts[2].question == cloze["question"]


@pytest.mark.parametrize("row", [
    {"question": "Find n.", "answer": "70"}, {"problem": "Find n.", "answer": 70, "id": 0},
    {"ID": "2025-I-1", "Problem": "Find n.", "Solution": "…", "Answer": 70},
])  # fmt: skip
def test_aime_2025_in_its_public_forms(tmp_path, row):
    write(tmp_path / "aime2025" / "aime2025-I.jsonl", [row])
    benchmark = load("aime2025", None, tmp_path)
    assert (benchmark.prompts[0].question, benchmark.prompts[0].answer, benchmark.k) == ("Find n.", "70", 64)
    write(tmp_path / "aime2025" / "aime2025-II.jsonl", [row])
    with pytest.raises(InputError, match="both look like it"):
        load("aime2025", None, tmp_path)


def test_a_set_of_ones_own_by_its_columns_or_a_map(tmp_path):
    from curation.fields import by_user

    path = write(tmp_path / "mine.jsonl", [{"q": {"text": "1 + 1?"}, "a": 2, "problem": "other", "answer": "other"}])
    assert load("mine", path, None).prompts[0].answer == "other"
    mapped = load("mine", path, None, fields=by_user({"question": "q.text", "answer": "a"}))
    assert (mapped.prompts[0].question, mapped.prompts[0].answer) == ("1 + 1?", "2")


def test_limit_takes_the_first_and_leaves_k_to_the_whole_set(tmp_path):
    path = write(tmp_path / "m.jsonl", [{"question": f"{number}?", "answer": str(number)} for number in range(100)])
    benchmark = load("m", path, None, limit=3)
    assert [prompt.answer for prompt in benchmark.prompts] == ["0", "1", "2"]
    assert (benchmark.size, benchmark.k) == (100, 20)
    assert load("m", path, None, limit=3, k=5).k == 5
    assert benchmark.digest != load("m", path, None, limit=4).digest


def test_what_is_asked_decides_the_digest(tmp_path):
    rows = [{"question": "1?", "answer": "1"}, {"question": "2?", "answer": "2"}]
    first = load("m", write(tmp_path / "a.jsonl", rows), None)
    assert load("m", write(tmp_path / "b.jsonl", rows), None).digest == first.digest
    assert load("m", write(tmp_path / "c.jsonl", rows[::-1]), None).digest != first.digest
    assert load("m", write(tmp_path / "d.jsonl", [rows[0], rows[1] | {"answer": "3"}]), None).digest != first.digest


def test_table_three_is_the_papers():
    papers = {name: known.paper for name, known in KNOWN.items() if known.paper}
    assert papers == {
        "ck12-math": 96.24, "gaokao": 98.46, "mathbench-k12": 95.10, "cmath": 96.13, "math500": 98.44, "aime2024": 81.15,
        "aime2025": 69.95,
    }  # fmt: skip


def test_names():
    assert parse_names(["gsm8k,cmath", "mine=a,b.jsonl", "x=1.jsonl,y=2.jsonl,math500"]) == {
        "gsm8k": None, "cmath": None, "mine": Path("a,b.jsonl"), "x": Path("1.jsonl"), "y": Path("2.jsonl"), "math500": None,
    }  # fmt: skip


@pytest.mark.parametrize(("names", "said"), [
    (["gsm"], "'gsm' is no known benchmark; the nearest is 'gsm8k'; your own is gsm=PATH"),
    (["mine="], "'mine=' is neither NAME nor NAME=PATH"), (["a b=x"], "neither NAME nor NAME=PATH"),
    (["gsm8k,gsm8k"], "named twice"),
])  # fmt: skip
def test_names_that_are_none(names, said):
    with pytest.raises(InputError, match="--benchmarks") as caught:
        parse_names(names)
    assert said in str(caught.value)


def bad(tmp_path, content, suffix=".jsonl"):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        load("m", path, None)
    assert str(caught.value).startswith(str(path))
    assert len(" ".join(str(caught.value).split())) < 500
    return str(caught.value).removeprefix(str(path))


GOOD = '{"question": "1?", "answer": "1"}\n'


@pytest.mark.parametrize(("content", "said"), [
    ("", ": is empty"), ("\n\n", ": is empty"), (GOOD.encode("utf-16"), ": is UTF-16"),
    (GOOD.encode() + '{"question": "é", "answer": "1"}\n'.encode("latin-1"), ": line 2: is not UTF-8"),
    (GOOD + "{}\n", ": line 2: field question: None is missing or blank"),
    (GOOD + '{"question": " ", "answer": "1"}\n', ": line 2: field question: ' ' is missing or blank"),
    (GOOD + '{"question": {"a": 1}, "answer": "1"}\n', ": line 2: field question: {'a': 1} is a dict, not a text"),
    (GOOD + '{"question": "1?", "answer": true}\n', ": line 2: field answer: True is a bool, not a text"),
    (GOOD + '{"question": "1?", "answer": {"x": 1}}\n', ": line 2: field answer: {'x': 1} is a dict, not a text"),
    (GOOD + '{"question": "1?", "answer": NaN}\n', ": line 2: field answer: nan is no answer"),
    (GOOD + '{"question": "1?", "answer": Infinity}\n', ": line 2: field answer: inf is no answer"),
    (GOOD + '{"question": "1?", "answer": "NaN"}\n', ": line 2: field answer: 'NaN' is no answer"),
    (GOOD + '{"question": "1?", "answer": "略"}\n', ": line 2: field answer: '略' is no answer"),
    (GOOD + '{"question": "1?"}\n', ": line 2: field answer: None is no answer"),
    (GOOD + "{\n", ": line 2: is not JSON"), (GOOD + "7\n", ": line 2: is a int (7), not an object"),
    (GOOD + '{"question": "1?", "options": ["a", "b"], "answer": "a"}\n', ": line 2: field answer: 'a' names no option"),
])  # fmt: skip
def test_bad_rows_are_refused_with_their_place(tmp_path, content, said):
    assert bad(tmp_path, content).startswith(said)


def test_a_line_of_50_megabytes_is_refused_and_never_held(tmp_path):
    import tracemalloc

    content = GOOD.encode() + b'{"question": "' + b"x" * 50_000_000 + b'", "answer": "1"}\n'
    tracemalloc.start()
    path = tmp_path / "long.jsonl"
    path.write_bytes(content)
    del content
    tracemalloc.reset_peak()
    with pytest.raises(InputError, match=r"line 2: the line has 50,000,\d+ bytes"):
        load("m", path, None)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()


def test_a_parquet_column_of_numbers_is_no_question(tmp_path):
    path = tmp_path / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": [[1.5], [2.5]], "answer": ["1", "2"]}), path)
    with pytest.raises(InputError, match=r"row 1: field question: .* is a list, not a text"):
        load("m", path, None)
    assert "is no Parquet file" in bad(tmp_path, GOOD, ".parquet")


def test_missing_ones_are_named(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        load("m", tmp_path / "none.jsonl", None)
    with pytest.raises(InputError, match=r"math500: no file is named; get it \(.*\) and write math500=PATH, or .* --data"):
        load("math500", None, None)
    with pytest.raises(InputError, match="there is no such folder"):
        load("math500", None, tmp_path / "none")
    with pytest.raises(InputError, match="is a folder; write mine=FILE"):
        load("mine", tmp_path, None)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["first", "second\nline", "third"], ["A. first", "B. second line", "C. third"]),
        (["x", "", "z"], ["A. x", "B. ", "C. z"]),
        (["a\fb", "c\u2028d"], ["A. a b", "B. c d"]),
        ([{"aoVal": "A", "content": "1\n"}, {"aoVal": "B", "content": "a\nb"}], ["A. 1", "B. a b"]),
    ],
)
def test_each_option_keeps_its_letter(tmp_path, options, lines):
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question": "Which?", "options": options, "answer": "B"}) + "\n", encoding="utf-8")
    (prompt,) = load("mine", file, None).prompts
    assert [line for line in prompt.question.split("\n") if line[:3] in ("A. ", "B. ", "C. ", "D. ", "E. ")] == lines
    assert prompt.answer == "B"
