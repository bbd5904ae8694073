"""The rank's side of an engine that sleeps while the policy trains, with a child that only records what it is asked. vLLM's own
sleep needs a GPU."""

import pytest
import torch

from rollout.engine import EngineError
from rollout.vllm.engine import VllmEngine
from rollout.weights.push import Sender
from tests.rollout.tiny_models import ModelSource, tiny_qwen2


class Child:
    """failing: what it is asked in vain; killed: everything else then is too."""

    name, pid = "rank 0's vLLM", 1

    def __init__(self, failing=()):
        self.asked, self.killed, self._failing = [], False, failing

    def wait_ready(self, seconds): ...

    def ask(self, kind, seconds, **fields):
        self.asked.append((kind, *fields.get("tags", ())))
        if self.killed or kind in self._failing:
            raise EngineError(f"{kind}: no answer")

    def kill(self):
        self.killed = True

    close = kill


def engine_of(children):
    return VllmEngine(lambda: children.pop(0), Sender(torch.float32, "engine", 1 << 30), end_token_ids=[1], sleeps=True)


def test_it_wakes_for_the_weights_first_and_for_the_cache_when_they_have_come():
    child = Child()
    engine, source = engine_of([child]), ModelSource(tiny_qwen2(0, tied=True, vocabulary=64, layers=1))
    engine.load(1, source)
    engine.sleep()
    engine.sleep()
    assert engine.version is None, "its weights are released"
    engine.load(2, source)
    kinds = [asked for asked in child.asked if asked[0] != "chunk"]
    awake = [("begin",), ("commit",)]
    assert kinds == [*awake, ("sleep",), ("wake", "weights"), ("begin",), ("wake", "kv_cache"), ("commit",)]
    assert engine.version == 2
    engine.close()


def test_a_sleep_that_fails_frees_the_memory_and_shows_at_the_next_push():
    """One rank alone must not raise while the others go on to the scoring."""
    broken, whole = Child(failing=("sleep",)), Child()
    engine, source = engine_of([broken, whole]), ModelSource(tiny_qwen2(0, tied=True, vocabulary=64, layers=1))
    engine.load(1, source)
    engine.sleep()
    assert broken.killed
    with pytest.raises(EngineError, match="no answer"):
        engine.load(2, source)
    engine.restart()
    engine.load(2, source)
    assert (engine.version, whole.asked[0]) == (2, ("begin",)), "a new one is awake"
    engine.close()
