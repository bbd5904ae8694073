"""Where a run goes on in its prompts, when a file was moved, changed, added or taken away between two starts."""

from pathlib import Path

import pytest

from rollout.errors import InputError
from rollout.prompts import PromptSource
from rollout.types import Prompt
from trainer.config import RunConfig
from trainer.cursors import go_on


def source(name, count=20):
    return PromptSource([Prompt(f"{name}-{number}", "?", "!") for number in range(count)], seed=3)


def after(name, drawn):
    moved = source(name)
    moved.draw(drawn)
    return moved.state()


def config(*paths):
    """A stage of two steps for each file."""
    stages = [
        {"name": f"stage {index}", "steps": 2, "context": 96, "data": {"train": {"path": path}, "max_prompt_tokens": 32}}
        for index, path in enumerate(paths)
    ]
    return RunConfig.model_validate({"run": Path("run"), "model": {"path": "m"}, "stages": stages})


def next_ids(one, count=3):
    return [prompt.id for prompt in one.draw(count)]


def test_the_same_file_goes_on_where_it_was():
    sources = {"a": source("a"), "b": source("b")}
    go_on(config("a", "b"), sources, {"a": after("a", 7), "b": after("b", 3)}, 3)
    assert (sources["a"].state(), sources["b"].state()) == (after("a", 7), after("b", 3))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_file_that_was_moved_goes_on_where_it_was(step):
    sources = {"/fast/a": source("a"), "b": source("b")}
    go_on(config("/fast/a", "b"), sources, {"a": after("a", 7), "b": after("b", 3)}, step)
    assert sources["/fast/a"].state() == after("a", 7)


def test_of_two_that_were_moved_each_goes_on_in_its_own():
    sources = {"/fast/a": source("a"), "/fast/b": source("b")}
    go_on(config("/fast/a", "/fast/b"), sources, {"b": after("b", 3), "a": after("a", 7)}, 3)
    assert (sources["/fast/a"].state(), sources["/fast/b"].state()) == (after("a", 7), after("b", 3))


def test_of_equal_prompts_each_goes_on_in_the_file_of_its_name():
    sources = {"/fast/b": source("same"), "/fast/a": source("same")}
    assert go_on(config("/fast/a", "/fast/b"), sources, {"a": after("same", 7), "b": after("same", 3)}, 3) == {
        "a": "/fast/a",
        "b": "/fast/b",
    }
    assert (sources["/fast/a"].state(), sources["/fast/b"].state()) == (after("same", 7), after("same", 3))


def test_other_prompts_with_the_ids_of_those_that_are_gone_are_others():
    """As files without ids have: they are numbered."""
    other = PromptSource([Prompt(f"a-{number}", "another?", "!") for number in range(20)], seed=3)
    with pytest.raises(InputError, match="other prompts than this stage began with"):
        go_on(config("c", "b"), {"c": other, "b": source("b")}, {"a": after("a", 7)}, 1)
    go_on(config("a", "b"), {"a": other, "b": source("b")}, {"a": after("a", 7)}, 1)  # mended in place: as before


def test_a_cursor_of_an_earlier_version_is_found_by_its_ids():
    old = {name: value for name, value in after("a", 7).items() if name != "content"}
    sources = {"/fast/a": source("a")}
    assert go_on(config("/fast/a"), sources, {"a": old}, 1) == {"a": "/fast/a"}
    assert sources["/fast/a"].state() == after("a", 7)


def test_a_copy_in_use_keeps_its_own_cursor():
    sources = {"a": source("a"), "copy of a": source("a")}
    go_on(config("a", "copy of a"), sources, {"a": after("a", 7)}, 2)
    assert sources["a"].state() == after("a", 7)
    assert sources["copy of a"].state()["position"] == 0


def test_other_prompts_for_a_stage_that_has_begun_are_refused():
    with pytest.raises(InputError, match=r"c: stages\[0\]\.data\.train\.path: other prompts .* step 1 goes on in a\); give"):
        go_on(config("c", "b"), {"c": source("c"), "b": source("b")}, {"a": after("a", 7)}, 1)
    with pytest.raises(InputError, match="saved over other prompts"):
        go_on(config("a", "b"), {"a": source("c"), "b": source("b")}, {"a": after("a", 7)}, 1)


@pytest.mark.parametrize("step", [0, 2])
def test_a_stage_that_has_not_begun_may_have_any(step):
    """Also where what the stage before it read is not read any more."""
    sources = {"c": source("c")}
    go_on(config("c", "c"), sources, {"a": after("a", 7)} if step else {}, step)
    assert sources["c"].state()["position"] == 0
    assert next_ids(sources["c"]) == next_ids(source("c"))


def test_the_end_of_a_run_asks_for_the_last_stages_file():
    go_on(config("a", "b"), {"a": source("a"), "b": source("b")}, {"a": after("a", 7), "b": after("b", 9)}, 4)
    with pytest.raises(InputError, match=r"c: stages\[1\]"):
        go_on(config("a", "c"), {"a": source("a"), "c": source("c")}, {"a": after("a", 7), "b": after("b", 9)}, 4)
