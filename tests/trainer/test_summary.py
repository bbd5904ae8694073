"""The numbers a run is judged by, on rows small enough to add up by hand."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from trainer.summary import summarize, table, write_summary


def rows() -> list[dict]:
    entropies = [0.9, 0.8, 0.7, 0.6, 0.56, 0.54]
    train = [
        {"kind": "train", "step": step, "stage": 0, "stage_name": "grpo", "entropy/mean": entropy, "entropy/target": 0.55}
        for step, entropy in enumerate(entropies, start=1)
    ]
    train.append({"kind": "train", "step": 7, "stage": 1, "stage_name": "dapo", "entropy/mean": 9.0, "ledger/drawn": 112})
    train[-1] |= {"ledger/trained": 40, "ledger/recovered": 16, "ledger/uniform": 50, "ledger/pending": 6}
    train[0] |= {"rate/sample": 100.0, "time/sample": 30.0, "time/step": 40.0, "time/update": None}
    train[1] |= {"rate/sample": 400.0, "time/sample": 10.0, "time/step": 20.0, "rate/update": 50.0}
    evals = [
        {"kind": "eval", "step": step, "name": name, "pass@1": score, "count": 200, "k": 4, "time/evaluate": 5.0}
        for step, name, score in ((0, "heldout", 0.4), (0, "hard", 0.1), (7, "heldout", 0.6), (7, "hard", None))
    ]
    return [*evals[:2], *train, *evals[2:]]


def test_summary_adds_up():
    summary = summarize(rows())
    assert (summary.steps, [(stage.name, stage.steps) for stage in summary.stages]) == (7, [("grpo", 6), ("dapo", 1)])
    assert summary.entropy.mean == pytest.approx(0.55), "the mean of steps 5 and 6: the last third of the first stage alone"
    assert (summary.entropy.target, summary.entropy.steps) == (0.55, 2)
    assert summary.ledger == {"drawn": 112, "trained": 40, "recovered": 16, "uniform": 50, "pending": 6}
    assert summary.seconds == {"step": 60.0, "sample": 40.0, "evaluate": 20.0}
    assert summary.sample_tokens_per_second == pytest.approx((100 * 30 + 400 * 10) / 40), "weighed by time, not by step"
    assert summary.update_tokens_per_second is None


def test_evaluations_are_first_and_last_of_each_set():
    hard, heldout = summarize(rows()).evaluations
    assert (heldout.first.step, heldout.first.pass_at_1, heldout.last.step, heldout.last.pass_at_1) == (0, 0.4, 7, 0.6)
    assert (heldout.last.count, heldout.last.k) == (200, 4)
    assert hard.last.step == 0, "a null pass@1 is no result"
    assert [change.name for change in summarize(rows(), eval_name="heldout").evaluations] == ["heldout"]
    assert summarize(rows(), eval_name="no such set").evaluations == ()


def test_summary_of_nothing_is_empty_and_still_written(tmp_path):
    summary = summarize([])
    assert summary.entropy is None
    assert json.loads(write_summary(tmp_path, summary).read_text())["steps"] == 0


def test_written_summary_is_the_summary(tmp_path):
    summary = summarize(rows())
    path = write_summary(tmp_path, summary, {"cores": "2"})
    assert json.loads(path.read_text()) == json.loads(json.dumps(asdict(summary))) | {"machine": {"cores": "2"}}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_table_says_the_result_in_a_terminal_of_80_columns():
    terminal = Console(width=80, record=True, file=io.StringIO())
    terminal.print(table(summarize(rows()), Path("runs/demo/figures")))
    text = " ".join(terminal.export_text().split())
    expected = ("40.0% at step 0 → 60.0% at step 7 (200 prompts × 4)", "0.550, target 0.55", "recovered 16", "runs/demo/figures")
    assert [words for words in expected if words not in text] == []
