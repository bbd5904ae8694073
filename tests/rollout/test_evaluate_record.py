"""What is kept of an evaluation survives any end of the process, and nothing else is taken for it."""

import json

import numpy as np
import pytest

from rollout.errors import InputError
from rollout.evaluate.grading import Grade
from rollout.evaluate.record import OUTPUTS, SESSIONS, SETTINGS, Record
from rollout.types import Prompt, Sample

SETTINGS_NOW = {"model": "abc", "decoding": {"temperature": 1.0, "top_p": 0.7}, "benchmarks": {"b": {"k": 2}}}


def judged(question, number, right=True, reason="right", text="ß<answer>7</answer>"):
    sample = Sample(np.array([1, 2, 3], np.int32), np.zeros(3, np.float32), "stop", 1)
    return (
        question,
        number,
        Prompt(f"b-{question}", "?", "7"),
        sample,
        Grade(right, reason, text=text, answer="7", rewarded=right),
    )


def test_outputs_come_back_as_they_were_kept(tmp_path):
    record = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    record.append("b", [judged(0, 0), judged(0, 1, False, "wrong")], 1.5)
    record.append("c", [judged(0, 0, False, "unjudged")], 2.5)
    record.close()
    again = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    assert again.outcomes("b") == record.outcomes("b")
    assert set(again.outcomes("b")) == {(0, 0), (0, 1)}
    assert [outcome.right for outcome in again.outcomes("b").values()] == [True, False]
    assert again.outcomes("c")[0, 0].right is None
    assert (record.session, again.session) == (0, 1)
    row = json.loads((tmp_path / OUTPUTS).read_text(encoding="utf-8").splitlines()[0])
    assert (row["text"], row["gold"], row["tokens"], row["finish"], row["id"]) == ("ß<answer>7</answer>", "7", 3, "stop", "b-0")


def test_an_output_that_is_there_is_left_as_it_was(tmp_path):
    record = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    record.append("b", [judged(0, 0)], 1.0)
    record.append("b", [judged(0, 0, False, "wrong"), judged(0, 1)], 2.0)
    assert record.outcomes("b")[0, 0].right is True
    assert len((tmp_path / OUTPUTS).read_text().splitlines()) == 2


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_cut_off(tmp_path, cut):
    record = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    record.append("b", [judged(0, 0)], 1.0)
    whole = (tmp_path / OUTPUTS).read_bytes()
    record.append("b", [judged(0, 1)], 2.0)
    record.close()
    (tmp_path / OUTPUTS).write_bytes((tmp_path / OUTPUTS).read_bytes()[:-cut])
    again = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    assert set(again.outcomes("b")) == {(0, 0)}
    again.append("b", [judged(0, 1)], 1.0)
    assert (tmp_path / OUTPUTS).read_bytes().startswith(whole + b'{"benchmark"')
    again.close()
    assert set(Record(tmp_path, SETTINGS_NOW, {"cpu": "one"}).outcomes("b")) == {(0, 0), (0, 1)}


@pytest.mark.parametrize("line", ["{", "[]", '{"benchmark": "b"}', "7", "\x00\x00"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    record = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    record.append("b", [judged(0, 0)], 1.0)
    record.close()
    whole = (tmp_path / OUTPUTS).read_text()
    (tmp_path / OUTPUTS).write_text(whole + line + "\n" + whole)
    with pytest.raises(InputError, match=r"outputs\.jsonl: line 2 is no output"):
        Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})


@pytest.mark.parametrize(("change", "said"), [
    ({"model": "abd"}, 'begun with model "abc", now it is "abd"'),
    ({"decoding": {"temperature": 0.6, "top_p": 0.7}}, "begun with decoding.temperature 1.0, now it is 0.6"),
    ({"benchmarks": {"b": {"k": 3}}}, "begun with benchmarks.b.k 2, now it is 3"),
    ({"benchmarks": {"b": {"k": 2}, "c": {"k": 1}}}, "begun with benchmarks.c null, now it is"),
])  # fmt: skip
def test_a_folder_begun_otherwise_is_refused_and_left_alone(tmp_path, change, said):
    record = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    record.append("b", [judged(0, 0)], 1.0)
    record.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        Record(tmp_path, SETTINGS_NOW | change, {"cpu": "one"})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_outputs_without_their_settings_are_nobodys(tmp_path):
    record = Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})
    assert list(tmp_path.iterdir()) == [], "nothing is written before the first output"
    record.append("b", [judged(0, 0)], 1.0)
    record.close()
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(InputError, match="nobody knows what was asked"):
        Record(tmp_path, SETTINGS_NOW, {"cpu": "one"})


def test_every_machine_that_sampled_something_is_named(tmp_path):
    one, two = {"cpu": "one"}, {"cpu": "two"}
    for number, machine in enumerate((one, one, two)):
        record = Record(tmp_path, SETTINGS_NOW, machine)
        record.append("b", [judged(0, number)], 1.0)
        record.close()
    reader = Record(tmp_path, SETTINGS_NOW, {"cpu": "three"})
    assert reader.provenance() == [one, two], "the one that only reads did not measure"
    with (tmp_path / SESSIONS).open("ab") as file:
        file.write(b'{"cpu": "to')
    assert reader.provenance() == [one, two]


def test_a_torn_session_is_cut_off_before_the_next(tmp_path):
    one, two = {"cpu": "one"}, {"cpu": "two"}
    record = Record(tmp_path, SETTINGS_NOW, one)
    record.append("b", [judged(0, 0)], 1.0)
    record.close()
    with (tmp_path / SESSIONS).open("ab") as file:
        file.write(b'{"cpu": "to')
    again = Record(tmp_path, SETTINGS_NOW, two)
    again.append("b", [judged(0, 1)], 1.0)
    again.close()
    assert again.provenance() == [one, two]
    assert (tmp_path / SESSIONS).read_bytes() == b'{"cpu": "one"}\n{"cpu": "two"}\n'
