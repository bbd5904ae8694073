"""What is kept of a step for a reader: which groups, what of each, and files that a kill, a full disk or an old version leave
readable."""

import errno
import gzip
import json
import math
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from test_guards import groups_of
from tiny_policy import Naive, batches, build_actor, stage

from rollout.ranks import Ranks
from rollout.recovery import BatchCollector, Ledger
from rollout.reward.tokens import ByteReader, byte_characters
from rollout.sampler import Collected
from rollout.types import Group, Prompt, Sample, Verdict
from trainer import samples as files
from trainer.actor import Scoring
from trainer.batch import MiniBatch
from trainer.config import ObjectiveConfig
from trainer.config_samples import SamplesConfig
from trainer.sample_recorder import SampleRecorder, chosen, fates, kept_group, rounded
from trainer.samples import KeptGroup, KeptSample, drop_after, files_of, line_of, read_samples, write_step
from trainer.token_values import key_of

READER = ByteReader({character: byte for byte, character in byte_characters().items()})
"""A token a byte."""


def group(rights: str, *, step: int = 4, text: str = "ja", name: str = "q") -> Group:
    """rights: of each output, "+", "-" or "?" for one without a verdict. step: from 0, as in the sampler."""
    ids = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)
    verdicts = {"+": Verdict(True, "right", mixed=True), "-": Verdict(False, "wrong", "why"), "?": Verdict.unjudged("silent")}
    logprobs = np.linspace(-0.00049, -1.23456, len(ids), dtype=np.float32)
    samples = tuple(Sample(ids, logprobs, "stop", step) for _ in rights)
    return Group(
        Prompt(name, "1+1?", "2", "sums", "a solution"), ids[:1], samples, tuple(verdicts[each] for each in rights), step
    )


def kept(step: int, name: str = "q", **changes) -> KeptGroup:
    sample = KeptSample("ja你", True, "right", "", False, "stop", step - 1, 3, 0.7, **changes)
    return KeptGroup(step, 0, "one", Prompt(name, "?", "!"), "trained", step, (sample,))


DETAIL = {"ends": [1, 2, 3], "logprob": [-0.1, None, 0.0], "entropy": None}


# which


def test_of_each_fate_in_turn():
    names = ["recovered"] * 2 + ["trained"] * 3 + ["uniform", "waiting", "uniform", "uniform"]
    fated = list(enumerate(names))
    assert [place for place, _ in chosen(fated, 4)] == [0, 2, 5, 6], "the first of each"
    assert [place for place, _ in chosen(fated, 6)] == [0, 2, 3, 5, 6, 7], "then the second, trained ones first"
    assert [place for place, _ in chosen(fated, 3)] == [0, 2, 5]
    assert chosen(fated, 100) == fated
    assert chosen([], 8) == []


@pytest.mark.parametrize(
    ("dynamic", "recover", "capacity"), [(True, True, None), (True, True, 1), (True, False, None), (False, False, None)]
)
def test_fates_are_those_of_the_ledger(dynamic, recover, capacity):
    recovered = [group("+-", step=3), group("-+", step=3)] if recover else []
    ledger = Ledger(drawn=len(recovered))
    collector = BatchCollector(4, 3, dynamic, recovered, ledger)
    drawn = [group("++"), group("+-"), group("+?"), group("--"), group("-+"), group("+-"), group("-+")]
    collector.add_round(drawn, len(drawn))
    batch, waiting = collector.finish(recover=recover, capacity=capacity)
    fated = fates(batch, collector.sampled, waiting, 5, dynamic)
    counts = Counter(fate for _, fate in fated)
    assert len(fated) == len({id(each) for each, _ in fated}) == len(drawn) + len(recovered)
    assert {fate: counts[fate] for fate in ("trained", "recovered", "uniform", "expired", "failed")} == {
        fate: getattr(ledger, fate) for fate in ("trained", "recovered", "uniform", "expired", "failed")
    }
    assert counts["waiting"] == len(waiting) == ledger.pending()
    assert [each for each, _ in fated[:3]] == batch


# what of each


def test_a_group_as_it_is_kept():
    objective = ObjectiveConfig(advantage="centered")
    one = group("+-", text="a你")
    key = key_of(one.prompt_token_ids, one.samples[0].token_ids)
    entropies = {key: np.array([0.1, 0.25, 0.0, 1.0], dtype=np.float32)}
    found = kept_group(one, "recovered", 6, 1, stage(objective), READER, entropies)
    assert found.prompt == Prompt("q", "1+1?", "2", "sums"), "without what only a scorer reads"
    assert (found.step, found.stage, found.stage_name, found.drawn_step) == (6, 1, "tiny", 5)
    right, wrong = found.samples
    assert right.text == "a你"
    assert right.ends == [1, 2, 2, 2]
    assert right.logprob == [0.0, -0.412, -0.823, -1.235]
    assert right.entropy == [0.1, 0.25, 0.0, 1.0]
    assert (right.right, right.mixed, right.advantage, right.tokens, right.version, right.finish) == (
        True,
        True,
        1.0,
        4,
        4,
        "stop",
    )
    assert (wrong.right, wrong.reason, wrong.detail, wrong.advantage) == (False, "wrong", "why", -1.0)
    assert kept_group(one, "uniform", 5, 1, stage(objective), READER, entropies).samples[0].entropy is None, "it was not scored"
    plain = kept_group(group("+?"), "failed", 5, 1, stage(objective), READER, None)
    assert [sample.advantage for sample in plain.samples] == [None, None]
    assert (plain.samples[0].ends, plain.samples[0].logprob, plain.samples[0].entropy) == (None, None, None)


def test_numbers_are_rounded_and_none_is_lost():
    values = np.array([-0.0004, -1.2345678, math.nan, -math.inf, 12345.6], dtype=np.float32)
    assert json.dumps(rounded(values)) == "[0.0, -1.235, null, null, 12345.6]"


@pytest.mark.parametrize("in_parts", [False, True], ids=["at once", "scored on the way"])
def test_each_token_has_its_own_entropy(mesh, tmp_path, in_parts):
    """Against fp64, one sequence at a time; of some groups of two mini-batches, packed into three micro-batches each."""
    config = stage(ObjectiveConfig(), micro=3, mini=1 if in_parts else 2)
    actor = build_actor(mesh, config)
    whole = batches(config)
    if in_parts:
        scoring = Scoring(actor, config)
        for part in (whole[0].sequences[6:], whole[0].sequences[:6]):
            scoring.add(MiniBatch(part))
        scored = [scoring.finish(whole[0])]
    else:
        scored = actor.score(whole, config)
    batch = [each for mini in whole for each in groups_of(mini)]
    notes, recorder = recording(tmp_path, config, groups=3)
    recorder.keep(5, Collected(batch, batch, 1), [], scored)
    found = list(read_samples(tmp_path, notes.append))
    assert not notes
    assert [each.prompt.id for each in found] == [each.prompt.id for each in batch[:3]]
    entropies = [values for mini in whole for values in Naive(mini, config, tied=False).entropies]
    got = [sample.entropy for each in found for sample in each.samples]
    assert len(got) == 9
    for values, expected in zip(got, entropies, strict=False):
        np.testing.assert_allclose(values, expected.detach().numpy(), atol=6e-4)


def recording(run, config, ranks=None, **settings):
    """(its notes, a recorder)."""
    notes = []
    run_config = SimpleNamespace(
        run=run,
        samples=SamplesConfig(**settings),
        stages=[config],
        stage_of=lambda _: 0,
        parallel=SimpleNamespace(sequence_ranks=1),
    )
    return notes, SampleRecorder(run_config, ranks or Ranks(), READER, notes.append)


CONFIG = stage(ObjectiveConfig())


def test_how_often_and_how_much(tmp_path):
    batch = [group("+-", name=str(place)) for place in range(3)]
    _, recorder = recording(tmp_path, CONFIG, groups=2, every=3, tokens=False)
    for step in range(1, 8):
        recorder.keep(step, Collected(batch, batch, 1), [], "not looked at without token detail")
    assert [path.name for path in files_of(tmp_path)] == ["step-000003.jsonl.gz", "step-000006.jsonl.gz"]
    found = list(read_samples(tmp_path))
    assert [each.prompt.id for each in found] == ["0", "1"] * 2
    assert {sample.ends for each in found for sample in each.samples} == {None}
    _, none = recording(tmp_path / "none", CONFIG, groups=0)
    none.keep(1, Collected(batch, batch, 1), [], [])
    assert not (tmp_path / "none").exists()


def test_no_rank_but_the_first_writes(tmp_path):
    class Second(SimpleNamespace):
        first = False

        def broadcast(self, _):
            return {b"what the first one wants"}

        def gather(self, value):
            self.gathered = value

    ranks, batch = Second(), [group("+-")]
    _, recorder = recording(tmp_path, CONFIG, ranks)
    recorder.keep(5, Collected(batch, [], 1), [], [])
    assert ranks.gathered == []
    assert not list(tmp_path.iterdir())


# the files


def test_groups_come_back_as_written(tmp_path):
    steps = {12: [kept(12, **DETAIL), kept(12, "other")], 9: [kept(9)], 1000000: [kept(1000000)]}
    for step, groups in steps.items():
        write_step(tmp_path, step, groups)
    assert list(read_samples(tmp_path)) == [each for step in sorted(steps) for each in steps[step]]
    assert list(read_samples(tmp_path / "elsewhere")) == []
    path = files_of(tmp_path)[1]
    before = path.read_bytes()
    write_step(tmp_path, 12, steps[12])
    assert path.read_bytes() == before, "no time in it"


def test_a_line_as_the_format_says():
    record = json.loads(line_of(kept(12, **DETAIL)))
    (sample,) = record.pop("samples")
    assert record == {
        "step": 12, "stage": 0, "stage_name": "one", "prompt": {"id": "q", "question": "?", "answer": "!", "source": ""},
        "fate": "trained", "drawn_step": 12,
    }  # fmt: skip
    assert sample == {
        "text": "ja你", "right": True, "reason": "right", "detail": "", "mixed": False, "finish": "stop", "version": 11,
        "tokens": 3, "advantage": 0.7, **DETAIL,
    }  # fmt: skip
    assert json.loads(line_of(kept(12)))["samples"][0].keys() == sample.keys() - DETAIL.keys()
    half = json.loads(line_of(kept(12, "\ud83d")))
    assert half["prompt"]["id"] == "\ud83d", "half a character ends nothing"


def test_torn_and_foreign_files_are_told_and_the_others_read(tmp_path):
    for step in range(1, 8):
        write_step(tmp_path, step, [kept(step, str(place), **DETAIL) for place in range(400)])
    paths = files_of(tmp_path)
    whole = paths[0].read_bytes()
    paths[0].write_bytes(whole[: len(whole) // 2])
    paths[1].write_bytes(b"no gzip")
    paths[2].write_bytes(gzip.compress(line_of(kept(3)) + b'{"step": 3}\n' + line_of(kept(3))))
    paths[3].write_bytes(gzip.compress(line_of(kept(4)) + b"[1]\n"))
    paths[4].write_bytes(b"")
    spoilt = bytearray(paths[5].read_bytes())
    spoilt[len(spoilt) // 2] ^= 255
    paths[5].write_bytes(spoilt)
    (tmp_path / "samples/step-000009.jsonl.gz").mkdir()
    notes = []
    counts = Counter(each.step for each in read_samples(tmp_path, notes.append))
    assert 0 < counts[1] < 400
    assert (counts[2], counts[3], counts[4], counts[5], counts[7], counts[9]) == (0, 1, 1, 0, 400, 0)
    told = [note.split(": ")[0] for note in notes]
    assert told == [str(path) for path in (*paths[:6], tmp_path / "samples/step-000009.jsonl.gz")]
    assert f"cannot be read after {counts[1]} groups, which are used (EOFError: " in notes[0]
    assert "cannot be read after 1 groups, which are used (KeyError: " in notes[2]
    assert all("\n" not in note for note in notes)


def test_older_and_newer_lines_are_read():
    record = json.loads(line_of(kept(2)))
    record["new"] = record["samples"][0]["new"] = record["prompt"]["new"] = 1
    assert files.group_of(record) == kept(2)


def test_what_a_run_that_goes_on_finds(tmp_path):
    for step in (1, 2, 3, 10):
        write_step(tmp_path, step, [kept(step)])
    (tmp_path / "samples/step-000002.jsonl.gz.tmp").write_bytes(b"torn")
    (tmp_path / "samples/a note of mine").write_text("stays")
    drop_after(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "a note of mine",
        "step-000001.jsonl.gz",
        "step-000002.jsonl.gz",
    ]
    for _ in range(2):
        drop_after(tmp_path, 0)
        assert [path.name for path in tmp_path.iterdir()] == ["samples.old"], (
            "as its metrics: a run that begins anew loses nothing"
        )
    assert len(list((tmp_path / "samples.old").iterdir())) == 3
    write_step(tmp_path, 1, [kept(1)])
    drop_after(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.old", "samples.old.2"]
    assert len(list((tmp_path / "samples.old").iterdir())) == 3, "a second start from nothing takes no record's place"


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, monkeypatch):
    notes, recorder = recording(tmp_path, CONFIG, tokens=False)
    batch = [group("+-")]

    def keep(*steps):
        for step in steps:
            recorder.keep(step, Collected(batch, batch, 1), [], [])

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", full)
        keep(1, 2, 3)
    assert notes == [f"samples of step 1 could not be written in {tmp_path}/samples (No space left on device); the run goes on"]
    assert not list((tmp_path / "samples").iterdir())
    keep(4)
    (tmp_path / "samples/step-000005.jsonl.gz.tmp").mkdir()
    keep(5, 6)
    assert len(notes) == 2, "it had written one in between"
    assert [path.name for path in files_of(tmp_path)] == ["step-000004.jsonl.gz", "step-000006.jsonl.gz"]
