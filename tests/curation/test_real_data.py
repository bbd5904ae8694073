"""Everything in the real data at once: the overlaps that are known to be there are found, and little else goes."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.options import Options, Source
from curation.pipeline import curate


@pytest.fixture(scope="module")
def curated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict]]:
    """(report, removed rows). Verification is left out: it has its own test, and takes half a minute."""
    competition = sorted(data.glob("eval_competition/*.jsonl")) + sorted(data.glob("eval_competition/*.parquet"))
    raw = [
        data / "gsm8k/train.jsonl",
        data / "math_train_rllm/math.json",
        data / "one_shot_rlvr/dsr_sub.parquet",
        data / "tal_scq5k/ch_single_choice_train_3K.jsonl",
        *sorted(data.glob("agieval/*.jsonl")),
        *sorted(data.glob("gaokao_bench/*.json")),
        data / "traces_math_cot_100/math_cot_100.jsonl",
        *competition,
    ]
    benchmarks = [*competition, *sorted(data.glob("gaokao_bench/*.json"))]
    out = tmp_path_factory.mktemp("real") / "prompts.parquet"
    options = Options(threads=2, skip=("verifiable",))
    made = curate([Source(path) for path in raw], [Source(path) for path in benchmarks], options, out)
    return made.data, pq.read_table(out.with_name("prompts.removed.parquet")).to_pylist()


def test_every_test_question_goes(curated) -> None:
    sources = curated[0]["sources"]
    assert [sources[name]["kept"] for name in ("math500", "amc23", "aime24", "gaokao")] == [0, 0, 0, 0]


def test_deepscaler_overlaps_with_math(curated) -> None:
    pairs = [
        row for row in curated[1] if row["source"] == "dsr_sub" and row["step"] == "exact" and row["partner"].startswith("math-")
    ]
    assert len(pairs) > 200


def test_chinese_duplicates(curated) -> None:
    counts = {
        step: sum(row["source"] == "tal-scq5k" and row["step"] == step for row in curated[1]) for step in ("exact", "fuzzy")
    }
    assert counts["exact"] > 100
    assert counts["fuzzy"] > 100


def test_questions_that_should_stay_stay(curated) -> None:
    report = curated[0]
    assert report["sources"]["gsm8k"]["kept"] >= 0.998 * report["sources"]["gsm8k"]["read"]
    assert report["sources"]["math"]["kept"] >= 0.97 * report["sources"]["math"]["read"]
    assert report["rows_quarantined"] == 2


def test_gsm8k_answers_are_its_numbers(data: Path) -> None:
    from curation import fields, readers

    path = data / "gsm8k/train.jsonl"
    chosen = fields.detect(readers.first_row(path), str(path))
    for _, row in readers.rows(path):
        assert chosen.read(row).answer == row["answer"].split("####")[1].strip()


def test_real_escapes_are_mended(data: Path) -> None:
    """Rows of these sets whose LaTeX lost a backslash to JSON: a tab or backspace where a command began."""
    from curation.clean import clean

    problems = [row["problem"] for row in json.loads((data / "math_train_rllm/math.json").read_text())]
    eaten = [text for text in problems if "\textbf" in text]
    assert eaten
    for text in eaten:
        assert "\t" not in clean(text, "1").question.replace("\t ", "")
