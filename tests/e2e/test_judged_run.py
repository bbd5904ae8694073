"""Whole runs whose prompts are half for the rule and half for a judge, a scripted one that leaves some without a verdict: the
ledger adds up, the run goes on; and where the judge is gone for good it stops, is kept, and goes on when the judge is back."""

import json
import re
import shutil
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from tiny_run import QUESTIONS, write_config, write_rows

from rollout.errors import EngineError, InputError
from tests.rollout.judge_endpoint import block, judged, scripted_judge
from trainer.config_file import load_config
from trainer.metrics import LEDGER_FATES, comparable, read_metrics

STEPS = 7
SILENT = {4, 9, 14, 19, 24, 29, 34, 39}
"""Questions on which the judge gives no verdict."""


def truthful(body):
    number = int(re.search(r"\d+", block(body, "QUESTION"))[0])
    if block(body, "QUESTION").startswith("digit") and number in SILENT:
        return (500, "not a verdict", '{"final": true}')[number % 3]
    return judged(body, block(body, "GROUND TRUTH") == block(body) or block(body, "QUESTION").startswith("(1)"))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """tiny, with every question of an even number and every silent one for the judge."""
    copy = tmp_path_factory.mktemp("judged")
    for name in ("warm", "base", "warmup.jsonl"):
        (copy / name).symlink_to(tiny / name)
    marked = [number for number in range(QUESTIONS) if number % 2 == 0 or number in SILENT]
    write_rows(
        copy / "train.jsonl",
        [
            {
                "id": f"q{number}",
                "question": f"digit {number}?",
                "answer": str(number % 4),
                "metadata": {"judge": number in marked},
            }
            for number in range(QUESTIONS)
        ],
    )
    return copy


@contextmanager
def a_run(folder, name, endpoint, **settings):
    """(configuration's path, the notes it showed); the run itself is the caller's."""
    judge = {"base_url": endpoint.url, "model": "judge", "tries": 2, "timeout_seconds": 2.0, "process": "off", "concurrency": 8}
    section = json.dumps({"judge": judge | settings})
    notes = []
    with (
        patch("trainer.console.Console.note", lambda self, text: notes.append(text)),
        patch("trainer.train.conclude"),
        patch("rollout.reward.judge.endpoint.FIRST_PAUSE_SECONDS", 0.01),
    ):
        yield write_config(folder, folder / name, ("seed: 3", f"seed: 3\nreward: {section}")), notes


def train(path):
    from trainer.train import run_rank

    assert run_rank(load_config(path)) == 0


def rows_of(run, kind="train"):
    return [comparable(row) for row in read_metrics(run) if row["kind"] == kind]


@pytest.fixture(scope="module")
def whole(folder):
    with scripted_judge(otherwise=truthful) as endpoint, a_run(folder, "whole", endpoint) as (path, notes):
        train(path)
        return folder / "whole", notes, len(endpoint.requests)


def test_the_ledger_adds_up_and_the_run_goes_on(whole):
    run, notes, requests = whole
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert sum(row[f"ledger/{fate}"] for fate in LEDGER_FATES) == row["ledger/drawn"]
        assert row["grad_norm"] > 0
    assert rows[-1]["ledger/failed"] == sum(row["sampling/unjudged"] for row in rows) > 0
    assert rows[-1]["ledger/recovered"] > 0
    assert any(row.get("verdict/unjudged", 0) > 0 for row in rows)
    said = [note for note in notes if "groups for the judge failed" in note]
    assert len(said) == sum(row["sampling/unjudged"] > 0 for row in rows)
    timed = [row for row in read_metrics(run) if row["kind"] == "train"]
    assert 0 < sum(row["judge/requests"] for row in timed) <= requests
    assert all(row["judge/requests"] >= row["judge/decided"] for row in timed)
    assert sum(row["judge/found"] for row in timed) > 0, "an answer of one digit comes again"


def test_nothing_unjudged_waits_in_a_buffer(whole):
    buffers = [json.loads(path.read_text("utf-8"))["buffer"] for path in whole[0].glob("checkpoints/*/state.json")]
    assert any(buffers)
    assert "unjudged" not in json.dumps(buffers)


def test_an_evaluation_says_what_was_not_judged(folder, whole):
    rows = rows_of(whole[0], "eval")
    assert all("unjudged" not in row for row in rows), "its three questions all get verdicts"
    with (
        scripted_judge(otherwise=lambda body: truthful(body) if block(body, "QUESTION").startswith("(1)") else 500) as endpoint,
        a_run(folder, "silent", endpoint) as (path, _),
        pytest.raises(EngineError),
    ):
        train(path)
    (row,) = rows_of(folder / "silent", "eval")
    assert 0 < row["unjudged"] < 1
    assert row["pass@1"] is not None


def test_a_step_done_again_asks_for_nothing_and_gives_the_same(folder, whole):
    """What a kill after step 4 leaves: its checkpoints, later rows in the metrics, and the judge's decisions of all steps."""
    run = folder / "again"
    shutil.copytree(whole[0], run)
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 4:
            shutil.rmtree(checkpoint)
    with scripted_judge(otherwise=truthful) as endpoint, a_run(folder, "again", endpoint) as (path, _):
        train(path)
        asked = [int(re.search(r"\d+", block(body, "QUESTION"))[0]) for body in endpoint.requests[1:]]  # the first is the check
    assert set(asked) <= SILENT, "what was decided was asked again"
    assert rows_of(run) == rows_of(whole[0])


def test_a_judge_that_is_gone_stops_the_run_which_goes_on_when_it_is_back(folder, whole):
    with (
        scripted_judge(otherwise=truthful) as endpoint,
        a_run(folder, "stopped", endpoint, max_unjudged_rounds=2) as (path, notes),
    ):

        def dies(body):
            checkpoints = list((folder / "stopped" / "checkpoints").glob("step-*"))
            return 503 if len(checkpoints) >= 3 else truthful(body)

        endpoint.otherwise = dies
        # Half of what it would be asked is known by then; without it the judge is silent.
        with (
            patch("rollout.reward.judge.store.Store.find", lambda self, key: None),
            pytest.raises(EngineError, match=r"no verdict in 2 rounds in a row.*; stopped after step \d, which is kept"),
        ):
            train(path)
        stopped = rows_of(folder / "stopped")
        assert 3 <= len(stopped) < STEPS
        assert any("judge: the endpoint is silent" in note for note in notes)
        endpoint.otherwise = truthful
        train(path)
    rows = rows_of(folder / "stopped")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert sum(row[f"ledger/{fate}"] for fate in LEDGER_FATES) == row["ledger/drawn"]


def test_what_is_refused_before_a_run(folder, tmp_path):
    config = load_config(write_config(folder, tmp_path / "run"))
    from trainer.preflight import check_run

    with pytest.raises(InputError, match=r"train.jsonl: 24 of 40 prompts are for a judge .*; set reward.judge.base_url"):
        check_run(config)
    with (
        scripted_judge(otherwise=401) as endpoint,
        a_run(folder, "refused", endpoint) as (path, _),
        pytest.raises(InputError, match=r"reward.judge.base_url: .* no verdict from judge: HTTP 401"),
    ):
        check_run(load_config(path))
    assert not (folder / "refused").exists()
    for value, why in (("127.0.0.1", "reward.judge.base_url"), ("http://a:b@127.0.0.1/v1", "name or password")):
        path = write_config(
            folder, tmp_path / "bad", ("seed: 3", f"seed: 3\nreward: {{judge: {{base_url: '{value}', model: m}}}}")
        )
        with pytest.raises(InputError, match=why):
            load_config(path)


def test_a_mark_that_is_no_truth_value(folder, tmp_path):
    from trainer.preflight import check_run

    write_rows(tmp_path / "train.jsonl", [{"id": "a", "question": "?", "answer": "1", "metadata": {"judge": "false"}}])
    (tmp_path / "warm").symlink_to(folder / "warm")
    (tmp_path / "base").symlink_to(folder / "base")
    path = write_config(
        folder, tmp_path / "run", ("data: {train: {path: " + str(folder), "data: {train: {path: " + str(tmp_path))
    )
    with pytest.raises(InputError, match=r"prompt a, metadata.judge: 'false' is not true or false; make it one"):
        check_run(load_config(path))
