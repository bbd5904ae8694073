"""What a run keeps of each step for a reader is what it sampled and trained on, and keeping it changes nothing."""

from collections import Counter

import pytest
from test_repeatable import STEPS, rows_of, train, train_on_two_ranks
from tiny_run import write_config

from trainer.samples import FOLDER, read_samples

ONE_UPDATE = ("mini_batches: 2", "mini_batches: 1")  # the weights that score are then those of the step's metrics
ALL = "samples: {groups: 1000}\nengine: {score_early: true}"


@pytest.fixture(scope="module")
def kept(tiny, tmp_path_factory):
    """(train rows, groups by step) of a run on two ranks that keeps everything."""
    run = tmp_path_factory.mktemp("kept") / "all"
    train_on_two_ranks(write_config(tiny, run, ONE_UPDATE, ("seed: 3", f"seed: 3\n{ALL}")))
    notes, steps = [], {}
    for group in read_samples(run, notes.append):
        steps.setdefault(group.step, []).append(group)
    assert not notes
    return [row for row in rows_of(run) if row["kind"] == "train"], steps


def test_every_step_has_its_groups_with_the_fates_of_the_ledger(kept):
    rows, steps = kept
    assert list(steps) == [row["step"] for row in rows] == list(range(1, STEPS + 1))
    before = Counter()
    for row in rows:
        groups = steps[row["step"]]
        fates = Counter(group.fate for group in groups)
        for fate in ("trained", "recovered", "uniform", "failed"):
            assert fates[fate] == row[f"ledger/{fate}"] - before[fate]
            before[fate] += fates[fate]
        assert fates["waiting"] == row["recovery/size"]
        assert {(group.stage, group.stage_name) for group in groups} == {(row["stage"], row["stage_name"])}
    assert before["recovered"] > 0 < before["uniform"]


def test_mean_entropy_is_that_of_the_metrics(kept):
    rows, steps = kept
    for row in rows:
        scored = [group for group in steps[row["step"]] if group.fate in ("trained", "recovered")]
        entropies = [value for group in scored for sample in group.samples for value in sample.entropy]
        assert len(entropies) == sum(sample.tokens for group in scored for sample in group.samples)
        assert sum(entropies) / len(entropies) == pytest.approx(row["entropy/mean"], abs=5e-4), "rounded to 3 decimals"


def test_each_sample_is_whole(kept):
    _, steps = kept
    for step, groups in steps.items():
        for group in groups:
            scored = group.fate in ("trained", "recovered")
            assert group.drawn_step == step - (group.fate == "recovered")
            for sample in group.samples:
                assert sample.version == group.drawn_step - 1
                assert len(sample.ends) == len(sample.logprob) == sample.tokens
                assert sample.ends == sorted(sample.ends)
                assert sample.ends[-1] == len(sample.text)
                assert (sample.entropy is not None) == (sample.advantage is not None) == scored
                assert sample.entropy is None or len(sample.entropy) == sample.tokens
                assert not sample.right or f"<answer>{group.prompt.answer}</answer>" in sample.text
            if group.fate == "uniform":
                assert len({sample.right for sample in group.samples}) == 1


def test_a_run_that_keeps_none_learns_the_same(tiny, tmp_path):
    usual, without = tmp_path / "usual", tmp_path / "without"
    train(write_config(tiny, usual))
    train(write_config(tiny, without, ("seed: 3", "seed: 3\nsamples: {groups: 0}")))
    assert rows_of(without) == rows_of(usual)
    assert (usual / FOLDER).is_dir()
    assert not (without / FOLDER).exists()
