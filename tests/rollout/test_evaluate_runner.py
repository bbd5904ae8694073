"""What is asked of an engine, what befalls it, and that neither changes what is kept."""

import numpy as np
import pytest

from rollout.engine import Decoding, EngineError
from rollout.evaluate.benchmarks import Benchmark
from rollout.evaluate.grading import Grade
from rollout.evaluate.record import Record
from rollout.evaluate.runner import RESTARTS, Parts, portions, sample, seed_of
from rollout.types import Prompt, Sample

QUESTIONS, K = 3, 4
BENCHMARK = Benchmark("b", "B", tuple(Prompt(f"b-{number}", f"{number}?", "1") for number in range(QUESTIONS)), 3, K, "")


class Engine:
    """Each output is its request's seed, or, where it does not stream, the batch's seed and its place there. After `dies_after`
    outputs in all it is lost, `deaths` times."""

    name = "scripted"

    def __init__(self, streams, dies_after=None, deaths=0):
        self.streams, self.dies_after, self.deaths = streams, dies_after, deaths
        self.delivered = 0
        self.submitted = []

    def submit(self, requests, decoding, progress=None):
        self.submitted.append((len(requests), decoding.seed))
        return Generation(self, requests, decoding)

    def output(self, place, request, decoding):
        word = request.seed if self.streams else decoding.seed + place
        return Sample(np.array([word % 1000], np.int32), np.zeros(1, np.float32), "stop", 1)


class Generation:
    def __init__(self, engine, requests, decoding):
        self.engine, self.decoding = engine, decoding
        self.left = list(enumerate(requests))

    @property
    def done(self):
        return not self.left

    def poll(self, seconds):
        engine = self.engine
        if engine.deaths and engine.dies_after is not None and engine.delivered >= engine.dies_after:
            engine.deaths -= 1
            raise EngineError("scripted: its process ended (signal 9)")
        count = 1 if engine.streams else len(self.left)
        taken, self.left = self.left[:count], self.left[count:]
        engine.delivered += len(taken)
        return [(place, engine.output(place, request, self.decoding)) for place, request in taken]

    def abort(self):
        self.left = []


class Sync:
    def __init__(self, starts=True):
        self.starts, self.recovered = starts, []

    def recover(self, errors):
        if not self.starts:
            raise EngineError("an engine does not start again")
        self.recovered += errors


class Grader:
    def judge(self, pairs):
        return [Grade(bool(sample.token_ids[0] % 2), "right", text=str(sample.token_ids[0])) for _, sample in pairs]


def parts(folder, engine, sync=None, tokens_per_batch=60):
    """Prompts of 5 tokens and 10 new ones: 4 sequences a batch."""
    encoded = {"b": [np.zeros(5, np.int32)] * QUESTIONS}
    return Parts(
        engine, sync or Sync(), Grader(), Record(folder, {"b": 1}, {"cpu": "one"}), encoded, Decoding(10), 7, tokens_per_batch
    )


def run(made, finished=lambda count: None):
    sample(BENCHMARK, made, lambda *_: None, finished)


def kept(made):
    return {place: (outcome.right, outcome.tokens) for place, outcome in made.record.outcomes("b").items()}


ENGINES = pytest.mark.parametrize("streams", [True, False], ids=["streams", "batches"])


@ENGINES
def test_every_output_is_kept_once_and_counted(tmp_path, streams):
    made, counted = parts(tmp_path, Engine(streams)), []
    run(made, counted.append)
    assert set(kept(made)) == {(question, number) for question in range(QUESTIONS) for number in range(K)}
    assert sum(counted) == QUESTIONS * K
    assert len((tmp_path / "outputs.jsonl").read_text().splitlines()) == QUESTIONS * K
    assert list(portions(BENCHMARK, made)) == []


@ENGINES
@pytest.mark.parametrize("lines", [0, 1, 5, 11])
def test_continued_it_gives_what_an_unbroken_one_does(tmp_path, streams, lines):
    whole = parts(tmp_path / "whole", Engine(streams)) if (tmp_path / "whole").mkdir() is None else None
    run(whole)
    text = (tmp_path / "whole" / "outputs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "broken").mkdir()
    for name in ("evaluation.json", "outputs.jsonl"):
        (tmp_path / "broken" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "broken" / "outputs.jsonl").write_text("".join(text[:lines]) + text[lines][:30])
    again = parts(tmp_path / "broken", Engine(streams))
    run(again)
    assert kept(again) == kept(whole)
    assert {outcome.session for outcome in again.record.outcomes("b").values()} == ({0, 1} if lines else {0})
    asked = sum(count for count, _ in again.engine.submitted)
    assert asked == (12 - lines if streams else 4 * (3 - lines // 4))


def test_batches_and_their_seeds_do_not_depend_on_what_is_kept(tmp_path):
    made = parts(tmp_path, Engine(streams=False))
    run(made)
    assert made.engine.submitted == [(4, seed_of(7, "b", number)) for number in range(3)]


def test_seeds_differ_by_all_that_names_an_output():
    seeds = [seed_of(7, name, *place) for name in ("a", "b") for place in ((0, 0), (0, 1), (1, 0), (0,), (1,))]
    assert len({*seeds, seed_of(8, "a", 0, 0)}) == len(seeds) + 1
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(7, "a", 0, 0) == seeds[0]


@ENGINES
@pytest.mark.parametrize("dies_after", [0, 4, 8])
def test_an_engine_that_dies_is_started_anew_and_changes_nothing(tmp_path, streams, dies_after):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken, broken = parts(tmp_path / "a", Engine(streams)), parts(tmp_path / "b", Engine(streams, dies_after, deaths=RESTARTS))
    run(unbroken)
    run(broken)
    assert kept(broken) == kept(unbroken)
    assert broken.sync.recovered == ["scripted: its process ended (signal 9)"] * RESTARTS
    if streams:
        left = QUESTIONS * K - dies_after
        assert [count for count, _ in broken.engine.submitted] == [QUESTIONS * K] + [left] * RESTARTS, "only what is missing"


@ENGINES
@pytest.mark.parametrize("starts", [True, False])
def test_an_engine_lost_for_good_ends_it_and_what_it_sampled_is_kept(tmp_path, streams, starts):
    made = parts(tmp_path, Engine(streams, dies_after=4, deaths=RESTARTS + 1), Sync(starts))
    with pytest.raises(EngineError, match="after 3 restarts" if starts else "does not start again"):
        run(made)
    assert len(kept(made)) == 4
    made.record.close()
    again = parts(tmp_path, Engine(streams))
    run(again)
    assert len(kept(again)) == QUESTIONS * K
