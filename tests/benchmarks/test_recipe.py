"""`python -m benchmarks.recipe`: what is planned, what is read off a run, each quick form through the real trainer."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from threading import Thread, get_ident
from types import SimpleNamespace

import numpy as np
import pytest
import reasoning_gym

from benchmarks.recipe import coefficient, rsr, ter
from benchmarks.recipe.__main__ import EXPERIMENTS
from benchmarks.recipe.plan import FULL, GRPO, QUICK, TER, Run, Start, config, warmup_config
from benchmarks.recipe.records import Mean, by_seed, last_third, paired, peak, reached, smoothed, where
from benchmarks.recipe.task import BUCKETS, HELDOUT, PARTS, PLAIN, Wording, solve, write_task
from benchmarks.recipe.work import check_finished, run_all
from rollout.errors import EngineError, RunStopped
from trainer.config import RunConfig
from trainer.config_file import load_config

ROOT = Path(__file__).parents[2]


# what is planned


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_a_configuration_that_the_trainer_takes(tmp_path, name, size):
    runs = EXPERIMENTS[name].runs(size)
    for run in {run.key: run for run in runs}.values():
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps({"run": "runs/x"} | config(run, Path("work"))))
        settings = load_config(file)
        assert isinstance(settings, RunConfig)
        assert settings.total_steps == run.size.steps >= size.steps
        file.write_text(json.dumps(warmup_config(run.start, Path("work"))))
        assert load_config(file).warmup.steps == run.start.warmup


@pytest.mark.parametrize("name", ["ter", "rsr", "pshw"])
def test_the_three_claims_have_five_seeds_of_every_arm(name):
    arms = {}
    for run in EXPERIMENTS[name].runs(FULL):
        arm = tuple(value for label, value in run.labels.items() if label != "seed")
        arms.setdefault(arm, set()).add(run.start.seed)
    assert set(map(len, arms.values())) == {5}
    assert len(arms) >= 3


def test_a_key_is_the_training_and_not_its_name():
    start = Start(1, 10)
    run = Run({"arm": "a"}, start, FULL, ({"objective": TER},))
    assert replace(run, labels={"arm": "b"}).key == run.key
    others = [
        replace(run, stages=({"objective": GRPO},)), replace(run, start=Start(2, 10)), replace(run, start=Start(1, 11)),
        replace(run, start=replace(start, wording=Wording(openers=2))), replace(run, context=81), replace(run, size=QUICK),
    ]  # fmt: skip
    assert len({run.key, *(each.key for each in others)}) == 1 + len(others)


def test_arms_differ_in_what_they_are_named_for_alone():
    runs = {run.labels["arm"]: config(run, Path("w"))["stages"][0] for run in rsr.runs(replace(FULL, seeds=1))}

    def differ(arm, base):
        return {key for key in runs[base] if runs[base][key] != runs[arm][key]}

    assert differ(rsr.WITH, rsr.WITHOUT) == {"recovery"}
    assert differ(rsr.WEIGHTED, rsr.WITH) == {"objective"}
    assert differ(rsr.LARGE, rsr.WITH) == {"batch"}
    assert differ(rsr.QUEUE, rsr.LARGE) == {"recovery"}
    assert runs[rsr.LARGE]["batch"]["prompts_per_round"] == 2 * FULL.groups
    assert runs[rsr.QUEUE]["recovery"]["max_age"] is None


# the task


@pytest.mark.parametrize("task", ["arithmetic", "letters"])
def test_problems_are_disjoint_scored_by_their_scorer_and_as_hard_as_they_say(tmp_path, task):
    write_task(tmp_path, task, PLAIN, 3)
    rows = {part: [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
            for part in (*PARTS, *BUCKETS)}  # fmt: skip
    assert {part: len(rows[part]) for part in PARTS} == PARTS
    assert [len(rows[bucket]) for bucket in BUCKETS] == [HELDOUT] * 3
    trained = {row["question"] for row in rows["train"]} | {row["question"] for row in rows["warmup"]}
    assert not trained & {row["question"] for bucket in BUCKETS for row in rows[bucket]}
    lengths = [np.mean([len(row["question"].split()) for row in rows[bucket]]) for bucket in BUCKETS]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[2]
    score = reasoning_gym.get_score_answer_fn(rows["hard"][0]["source"])
    for row in rows["hard"][:20]:
        assert score(row["answer"], row["metadata"]) == 1.0
        assert score(str(int(row["answer"]) + 1), row["metadata"]) < 1.0
    share = np.mean([row["answer"] == row["metadata"]["answer"] for row in rows["warmup"]])
    assert 0.3 < share < 0.75, "a teacher who is right too rarely or too often leaves nothing to learn"


def test_a_teacher_who_makes_no_slip_is_right():
    class Careful(random.Random):
        def random(self):
            return 0.999

    entry = {"shown": "4 + 7 - 9", "metadata": {}}
    lines, answer = solve("arithmetic", entry, PLAIN, Careful(1))
    assert answer == "2"
    assert [line.split()[-1] for line in lines.splitlines()] == ["11", "2"]
    entry = {"shown": "n in b a n a n a", "metadata": {"target_letter": "n"}}
    lines, answer = solve("letters", entry, PLAIN, Careful(1))
    assert answer == "2"
    assert [line.split()[-1] for line in lines.splitlines()] == ["0", "0", "1", "1", "2", "2"]


def test_a_wording_decides_how_many_words_there_are_to_choose_from():
    def entropy(wording):
        generator = random.Random(1)
        words = [wording.open(generator) for _ in range(4000)]
        shares = np.unique(words, return_counts=True)[1] / len(words)
        return -(shares * np.log(shares)).sum()

    low, right, high = (entropy(wording) for wording in ter.STARTS.values())
    assert low < 1.2 < right < 3.0 < high


# what is read off a run


def record(accuracy, drawn, seed=1, arm="", **more):
    """With pass@1 equal to the last training accuracy."""
    train = {"accuracy": accuracy, "drawn": drawn, "over_generation": [2.0], "buffer": [1.0], **more}
    return {"labels": {"arm": arm, "seed": seed}, "train": train, "eval": {"all": [accuracy[-1]]}}


def test_a_mean_has_students_interval():
    mean = Mean.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean.mean == 3.0
    assert mean.half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-6)
    assert mean.sure
    assert not Mean.of([-1.0, 2.0]).sure
    assert Mean.of([1.0]).half == math.inf
    assert Mean.of([1.0]).text(".1f") == "1.0"
    assert Mean.of([1.0, 3.0]).text("+.1f") == "+2.0 ± 12.7"


def test_a_change_says_whether_it_is_certain():
    assert Mean.of([-0.02, -0.021, -0.022]).change() == "-2.1 ± 0.2 points"
    assert Mean.of([0.1, -0.1, 0.03]).change() == "+1.0 ± 25.2 points (not certain)"
    assert Mean.of([0.3]).change(unit="%") == "+30.0 %"


def test_a_level_is_reached_between_two_steps():
    flat = record([0.0] * 4 + [1.0] * 6, [10.0 * (step + 1) for step in range(10)])
    np.testing.assert_allclose(smoothed(flat["train"]["accuracy"])[:6], [0, 0, 0.2, 0.4, 0.6, 0.8])
    assert reached(flat, 0.3, "drawn") == pytest.approx(35.0)
    assert reached(flat, 0.4, "drawn") == pytest.approx(40.0)
    assert reached(flat, 0.0, "drawn") == 10.0
    assert reached(flat, 1.01, "drawn") == math.inf
    assert peak(flat) == pytest.approx(1.0)
    assert last_third([0, 0, 0, 0, 0, 1, 2]) == 1.0
    assert smoothed([1.0, 3.0]).shape == (2,), "of fewer steps than the smoothing is wide"


def test_savings_are_of_the_level_that_both_reached():
    """The arm draws three quarters of the prompts for the same curve, and goes on to where the other never came."""
    accuracy = [*np.linspace(0.05, 0.5, 10), *[0.5] * 8]
    drawn = np.arange(1, 25)
    base = record(accuracy, (40.0 * drawn[:18]).tolist(), arm=rsr.WITHOUT)
    arm = record([*accuracy, *[0.9] * 6], (30.0 * drawn).tolist(), arm=rsr.WITH)
    assert rsr.prompts_saved([base, arm], rsr.WITH) == pytest.approx([0.25])
    assert rsr.fewer_drawn([base, arm], rsr.WITH) == pytest.approx([1 - 30 * 24 / (40 * 18)])
    assert rsr.prompts_saved([base, base | {"labels": {"arm": rsr.WITH, "seed": 1}}], rsr.WITH) == [0.0]


def test_entropy_that_swings_about_its_target_is_not_at_it():
    target = ter.TARGET
    swinging = record([0.1] * 6, [1.0] * 6, entropy=[target + 0.2 * (-1) ** step for step in range(6)])
    assert coefficient.distance(swinging) == pytest.approx(0.2)
    falling = record([0.1] * 8, [1.0] * 8, entropy=[target + 0.3] * 3 + [target] * 5)
    assert coefficient.distance(falling) == 0.0
    assert coefficient.arrival(falling) == 6, "where five steps have no other in them: 0.3 / 5 is not near"
    assert coefficient.arrival(record([0.1] * 4, [1.0] * 4, entropy=[target + 0.051] * 4)) == 5, "never"


def test_pairs_are_made_by_seed():
    first = [record([0.1], [1.0], seed) for seed in (1, 2)]
    second = [record([0.4], [1.0], 2), record([0.3], [1.0], 1)]
    assert paired(first, second, lambda each: each["train"]["accuracy"][0] * each["labels"]["seed"]).mean == pytest.approx(0.4)
    assert by_seed(first, second) == [(first[1], second[0]), (first[0], second[1])]
    assert where(first, seed=2) == [first[1]]


def test_a_run_that_was_stopped_is_not_taken_for_done(tmp_path):
    with pytest.raises(RunStopped, match="stopped after 0 of 2 steps"):
        check_finished(tmp_path, 2)
    rows = [{"kind": "eval", "step": 0}, {"kind": "train", "step": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunStopped, match="stopped after 1 of 2 steps; the same command goes on"):
        check_finished(tmp_path, 2)
    check_finished(tmp_path, 1)


def slow(item: SimpleNamespace, work: Path) -> float:
    """In a worker."""
    (work / item.key).touch()
    time.sleep(item.seconds)
    return item.seconds


def once_begun(folder: Path, do) -> None:
    def watch():
        while not list(folder.iterdir()):
            time.sleep(0.05)
        do()

    Thread(target=watch, daemon=True).start()


def test_an_interrupt_ends_the_workers_and_what_was_not_begun(tmp_path):
    """Of the command alone, as a service manager sends it; on a terminal the workers get their own. The system gives it to the
    watching thread, and the main one, which must act on it, stays asleep."""
    once_begun(tmp_path, lambda: signal.pthread_kill(get_ident(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_all("runs", slow, [SimpleNamespace(key=str(number), seconds=20.0) for number in range(4)], tmp_path, jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert not active_children()


def test_a_worker_that_is_killed_is_said(tmp_path):
    once_begun(tmp_path, lambda: active_children()[0].kill())
    with pytest.raises(EngineError, match="a worker ended in the middle of its runs"):
        run_all("runs", slow, [SimpleNamespace(key="0", seconds=20.0)], tmp_path, jobs=1)


# the command


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.recipe", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=800
    )


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_quick_form_of_every_experiment_runs_and_is_not_done_twice(tmp_path):
    ended = command("all", "--quick", "--work", tmp_path)
    assert ended.returncode == 0, ended.stderr
    for name, experiment in EXPERIMENTS.items():
        content = json.loads((tmp_path / "quick" / f"{name}.json").read_text())
        assert len(content["runs"]) == len(experiment.runs(QUICK))
        for each in content["runs"]:
            assert len(each["train"]["entropy"]) == len(each["train"]["tokens"]) >= QUICK.steps
            assert all(value > 0 for value in each["train"]["entropy"])
            assert each["eval"]["step"][0] == 0
        assert (tmp_path / "quick" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "| --- |" in (tmp_path / "quick" / f"{name}.md").read_text()
    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    again = command("ter", "rsr", "--quick", "--work", tmp_path)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")} == marks
    drawn = command("ter", "--quick", "--draw", "--work", tmp_path)
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.parametrize(("arguments", "said"), [
    (["tre"], "NAME 'tre': is no experiment; give all, or of ter, rsr"),
    (["ter", "--seeds", "0"], "invalid count value"),
    (["ter", "--draw", "--out", "nowhere"], "ter.json: missing; run the experiment first"),
])  # fmt: skip
def test_what_cannot_be_run_is_one_line(arguments, said):
    ended = command(*arguments)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert said in line
