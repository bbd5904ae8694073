"""Recent Sample Recovery against Algorithm 1 of arXiv 2506.18330, written down once more as plainly as the paper prints it.

Proves, on random reward streams: the same groups are trained in the same order, the same ones wait in the buffer, every prompt
drawn has the fate that the ledger counts, and nothing older than one step is ever trained on. It does not prove that the sampler
feeds the collector rightly (test_sampler.py does).
"""

import random
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from rollout.recovery import BatchCollector, Ledger, legitimate
from rollout.types import Group, Prompt, Sample, Verdict

STREAMS = 1000
TOKENS = np.zeros(1, dtype=np.int32)
SAMPLE = Sample(TOKENS, np.zeros(1, dtype=np.float32), "stop", 0)


@dataclass
class Case:
    """One random stream's settings."""

    steps: int
    needed: int
    group_size: int
    prompts_per_round: int
    right: float
    fails: float
    dynamic: bool
    recover: bool
    capacity: int | None
    max_age: int | None

    @classmethod
    def of(cls, generator: random.Random) -> "Case":
        dynamic = generator.random() < 0.85
        return cls(
            steps=generator.randint(2, 7),
            needed=generator.randint(1, 5),
            group_size=generator.randint(2, 4),
            prompts_per_round=generator.randint(1, 9),
            right=generator.choice([0.2, 0.5, 0.8]),
            fails=generator.choice([0.0, 0.0, 0.2]),
            dynamic=dynamic,
            recover=dynamic and generator.random() < 0.75,
            capacity=generator.choice([None, None, 1, 2, 4]),
            max_age=generator.choice([1, 1, 1, 2, None]),
        )


class Stream:
    """An endless stream of questions with the rewards that their outputs would get; None where sampling failed."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.generator, self.drawn = case, random.Random(seed), 0

    def round(self) -> list[tuple[str, list[int] | None]]:
        result = []
        for _ in range(self.case.prompts_per_round):
            rewards = [1 if self.generator.random() < self.case.right else -1 for _ in range(self.case.group_size)]
            failed = self.generator.random() < self.case.fails
            result.append((f"q{self.drawn}", None if failed else rewards))
            self.drawn += 1
        return result


def algorithm_1(case: Case, seed: int):
    """After each step: (names trained on, names in B_r, fate of every name drawn so far)."""
    stream = Stream(case, seed)
    fate: dict[str, str] = {}
    drawn_in: dict[str, int] = {}
    B_r: list[str] = []
    for step in range(case.steps):
        recovered = set(B_r)
        B_c = list(B_r)
        B_r = []
        while True:
            for name, rewards in stream.round():
                drawn_in[name] = step
                if rewards is None:
                    fate[name] = "failed"
                elif case.dynamic and (min(rewards) == max(rewards)):
                    fate[name] = "uniform"
                else:
                    B_c.append(name)
            if len(B_c) >= case.needed:
                break
        trained = []
        for place, name in enumerate(B_c):
            if place < case.needed:
                trained.append(name)
                fate[name] = "recovered" if name in recovered else "trained"
                assert case.max_age is None or step - drawn_in[name] <= case.max_age
            elif not case.recover or step - drawn_in[name] == case.max_age or len(B_r) == case.capacity:
                fate[name] = "expired"
            else:
                B_r.append(name)
                fate[name] = "pending"
        yield trained, list(B_r), Counter(fate.values())


def group(name: str, rewards: list[int], step: int) -> Group:
    verdicts = tuple(Verdict(reward == 1, "right" if reward == 1 else "wrong") for reward in rewards)
    return Group(Prompt(name, "?", "1"), TOKENS, (SAMPLE,) * len(rewards), verdicts, step)


def keju(case: Case, seed: int):
    """The same, by the code under test; with (drawn steps, ledger) beside."""
    stream, ledger, buffer = Stream(case, seed), Ledger(), []
    for step in range(case.steps):
        collector = BatchCollector(step, case.needed, case.dynamic, buffer, ledger)
        while not collector.complete:
            questions = stream.round()
            groups = [group(name, rewards, step) for name, rewards in questions if rewards is not None]
            collector.add_round(groups, drawn=len(questions))
        batch, buffer = collector.finish(recover=case.recover, capacity=case.capacity, max_age=case.max_age)
        yield batch, buffer, ledger, stream.drawn


def test_equals_algorithm_1_on_random_streams():
    seen = Counter()
    for seed in range(STREAMS):
        case = Case.of(random.Random(seed))
        steps = zip(keju(case, seed), algorithm_1(case, seed), strict=True)
        for step, ((batch, buffer, ledger, drawn), (trained, B_r, fates)) in enumerate(steps):
            where = f"stream {seed}, step {step}: {case}"
            assert [each.prompt.id for each in batch] == trained, where
            assert [each.prompt.id for each in buffer] == B_r, where
            if case.max_age is not None:
                assert all(step - each.drawn_step <= case.max_age for each in batch), where
                assert all(step - each.drawn_step < case.max_age for each in buffer), where
            counted = ledger.as_dict()
            assert counted.pop("drawn") == drawn, where
            assert counted == {name: fates[name] for name in counted}, where
            assert ledger.pending() == len(buffer) == fates["pending"], where
            assert ledger.drawn == sum(counted.values()) + ledger.pending(), where
            seen.update({name: count > 0 for name, count in fates.items()})
    rare = {name: seen[name] for name in ("trained", "uniform", "recovered", "expired", "failed", "pending") if seen[name] < 100}
    assert not rare, f"the streams hardly exercise {rare}"


def test_nothing_expires_where_a_round_brings_no_more_than_n():
    """Then the surplus is below N, and a queue without bound is the same algorithm."""
    expired = Counter()
    for seed in range(300):
        case = replace(Case.of(random.Random(seed)), steps=12, dynamic=True, recover=True, capacity=None, max_age=1)
        small, large = (replace(case, prompts_per_round=rounds * case.needed) for rounds in (1, 3))
        without_bound = keju(replace(small, max_age=None), seed)
        for (batch, buffer, ledger, _), (other, *_) in zip(keju(small, seed), without_bound, strict=True):
            assert len(buffer) < case.needed
            assert ledger.expired == 0
            assert [each.prompt.id for each in batch] == [each.prompt.id for each in other]
        expired[list(keju(large, seed))[-1][2].expired > 0] += 1
    assert expired[True] > 100, "where a round brings more, groups do expire"


def test_one_round_is_sampled_even_where_the_buffer_fills_the_batch():
    waiting = [group(f"old{index}", [1, -1], 4) for index in range(3)]
    ledger = Ledger(drawn=3)
    collector = BatchCollector(5, 2, True, waiting, ledger)
    assert collector.collected == 3
    assert not collector.complete
    collector.add_round([group("new", [1, -1], 5)], drawn=1)
    assert collector.complete
    batch, buffer = collector.finish(recover=True)
    assert [each.prompt.id for each in batch] == ["old0", "old1"]
    assert [each.prompt.id for each in buffer] == ["new"], "old2 was recovered once already and expires"
    assert ledger == Ledger(drawn=4, recovered=2, expired=1)
    assert ledger.pending() == 1


def test_without_dynamic_sampling_uniform_groups_are_trained_on():
    ledger = Ledger()
    collector = BatchCollector(0, 2, False, [], ledger)
    collector.add_round([group("all", [1, 1], 0), group("none", [-1, -1], 0)], drawn=2)
    batch, buffer = collector.finish(recover=False)
    assert [each.prompt.id for each in batch] == ["all", "none"]
    assert not buffer
    assert ledger == Ledger(drawn=2, trained=2)


@pytest.mark.parametrize(
    ("rewards", "expected"), [([1, 1], False), ([-1, -1], False), ([1, -1], True), ([-1, -1, -1, 1], True), ([1, 1, 1, -1], True)]
)
def test_legitimate(rewards, expected):
    assert legitimate(group("q", rewards, 0)) is expected
