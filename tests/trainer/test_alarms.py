"""Each alarm on rows of its failure: it begins when its rule says, ends when it says, and is silent on a healthy run."""

import json
import re
from pathlib import Path

import pytest
from tiny_policy import stage

from trainer.alarms import Alarms, watches
from trainer.config import ObjectiveConfig, RecoveryConfig
from trainer.config_file import load_config
from trainer.config_guards import ALARMS, AlarmsConfig

ROOT = Path(__file__).parents[2]
PLAIN = stage(ObjectiveConfig())
DYNAMIC = PLAIN.model_copy(
    update={"batch": PLAIN.batch.model_copy(update={"dynamic": True}), "recovery": RecoveryConfig(enabled=True)}
)
HEALTHY = {
    "entropy/mean": 0.5,
    "length/mean": 400.0,
    "language/mixed": 0.01,
    "verdict/right": 0.5,
    "sampling/over_generation": 2.0,
    "recovery/size": 3,
    "mismatch/mean": 0.01,
    "mismatch/mean_bound": 0.05,
    "mismatch/token_bound": 0.2,
    "mismatch/beyond": 0.0,
    "mismatch/alarm": 0,
}


def course(*parts, stages=(DYNAMIC,)):
    """Rows: each part (number of steps, what differs from HEALTHY: a value, or a function of the step's place in the part)."""
    rows, recovered = [], 0
    for count, changes in parts:
        for place in range(count):
            row = HEALTHY | {key: value(place) if callable(value) else value for key, value in changes.items()}
            recovered += row.pop("used", 3)
            rows.append({"kind": "train", "stage": 0} | row | {"step": len(rows) + 1, "ledger/recovered": recovered})
    return rows


def play(rows, stages=(DYNAMIC,), **settings):
    """(name → steps at which it lasted, notes)."""
    notes, lasted = [], {}
    alarms = Alarms(AlarmsConfig(**settings), stages, notes.append)
    for row in rows:
        for name, value in alarms.see(row).items():
            if value:
                lasted.setdefault(name.removeprefix("alarm/"), []).append(row["step"])
    return lasted, notes


def test_the_list_of_alarms_is_whole():
    assert tuple(watches(AlarmsConfig())) == ALARMS


def test_a_healthy_run_has_none():
    rows = course((40, {}))
    lasted, notes = play(rows)
    assert (lasted, notes) == ({}, [])
    alarms = Alarms(AlarmsConfig(), (DYNAMIC,))
    assert [alarms.see(row) for row in rows][-1] == {f"alarm/{name}": 0 for name in ALARMS}


TARGET = {"entropy/target": 0.55}
FAILURES = {
    # name: (failing part, first step of the alarm, after 20 healthy steps of which the last five fill every window)
    "entropy": ({"entropy/mean": 0.05} | TARGET, 30, "mean entropy 0.05 nats, band 0.275 to 0.825 (target 0.55)"),
    "language": ({"language/mixed": 0.2}, 23, "outputs that mix languages 12.4%, mean of 5 steps, bound 11.0%"),
    "repetition": ({"verdict/repetition": 0.3}, 22, "outputs refused for repetition 12.0%, mean of 5 steps, bound 10.0%"),
    "truncation": ({"verdict/truncated": 0.9}, 22, "outputs cut off at the limit 36.0%, mean of 5 steps, bound 25.0%"),
    "length": ({"length/mean": 100.0}, 24, "mean length 160 tokens, mean of 5 steps, bound 200"),
    "recovery_empty": ({"recovery/size": 0, "used": 0}, 30, "0 groups left to recover"),
    "recovery_unused": ({"used": 0}, 25, "0 of 3 waiting groups trained on"),
    "over_generation": ({"sampling/over_generation": 30.0}, 22, "13.2 groups sampled for each trained on, mean of 5 steps"),
    "mismatch": ({"mismatch/mean": 0.06, "mismatch/alarm": 1}, 21, "sampler and trainer disagree: mean |Δ log-probability| 0.06"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_sounds_on_its_failure_and_on_no_other_and_ends(name):
    failing, first, told = FAILURES[name]
    start = TARGET if name == "entropy" else {}
    rows = course((20, start), (20, failing), (20, start))
    lasted, notes = play(rows)
    assert list(lasted) == [name]
    assert lasted[name][0] == first
    assert lasted[name] == list(range(first, lasted[name][-1] + 1))
    assert 41 <= lasted[name][-1] <= 50, "it ends some steps after its cause"
    assert [note.partition(":")[0] for note in notes] == [f"step {first}", f"step {lasted[name][-1] + 1}"]
    assert notes[0].startswith(f"step {first}: ALARM {name}: {told}")
    assert "; look at " in notes[0]
    assert f"alarm {name} ends: " in notes[1]


def test_entropy_leaves_its_band_upwards_too_and_without_a_target_by_the_stages_start():
    up, _ = play(course((5, TARGET), (15, {"entropy/mean": 0.9} | TARGET)))
    assert up == {"entropy": list(range(15, 21))}
    drifting = {"entropy/mean": lambda place: 0.5 * 0.9**place}
    down, notes = play(course((5, {}), (40, drifting)))
    assert down["entropy"][0] == 5 + 17 + 9, "0.9^16 < 0.2 first at place 16, the tenth such step is nine later"
    assert "band 0.1 to 1.5 (the stage's first mean 0.5)" in notes[0]
    third, _ = play(course((5, {}), (40, {"entropy/mean": 0.17})))
    assert third == {}, "a third of its start is usual where answers become certain"


def test_a_single_bad_step_does_not_sound_where_the_rule_wants_several():
    for name in ("entropy", "language", "repetition", "truncation", "length", "recovery_empty", "recovery_unused"):
        failing, _, _ = FAILURES[name]
        start = TARGET if name == "entropy" else {}
        assert play(course((20, start), (1, failing), (20, start)))[0] == {}, name


def test_a_share_that_has_always_been_so_does_not_rise():
    assert play(course((40, {"language/mixed": 0.6, "verdict/truncated": 0.6})))[0] == {}


def test_a_rise_is_from_the_least_and_a_fall_from_the_greatest():
    mixed = course((10, {"language/mixed": 0.25}), (10, {"language/mixed": 0.05}), (10, {"language/mixed": 0.25}))
    assert play(mixed)[0] == {"language": list(range(23, 31))}
    length = course((10, {}), (10, {"length/mean": 1000.0}), (10, {}))
    assert play(length)[0] == {"length": list(range(25, 31))}


def test_windows_start_anew_with_a_stage_where_the_quantity_may_jump():
    jump = {"stage": 1, "length/mean": 150.0, "entropy/mean": 2.0, "verdict/truncated": 0.6}
    rows = course((20, {"stage": 0}), (30, jump))
    assert play(rows, stages=(DYNAMIC, DYNAMIC))[0] == {}
    mixed = course((20, {"stage": 0}), (20, {"stage": 1, "language/mixed": 0.3}))
    assert list(play(mixed, stages=(DYNAMIC, DYNAMIC))[0]) == ["language"], "no stage is a reason to mix languages"


def test_a_stages_alarm_ends_with_it():
    rows = course((20, {}), (8, {"length/mean": 50.0}), (3, {"stage": 1, "length/mean": 50.0}))
    lasted, notes = play(rows, stages=(DYNAMIC, DYNAMIC))
    assert lasted["length"][-1] == 28
    assert notes[-1] == "step 29: alarm length ends: a new stage begins"


def test_what_does_not_apply_says_nothing():
    alarms = Alarms(AlarmsConfig(language=None), (PLAIN,))
    for row in course((20, {})):
        said = alarms.see(row)
    assert sorted(said) == sorted(f"alarm/{name}" for name in ("entropy", "repetition", "truncation", "length", "mismatch"))
    row = dict.fromkeys(HEALTHY) | {"kind": "train", "step": 21, "stage": 0}
    row.pop("mismatch/mean_bound")
    assert Alarms(AlarmsConfig(), (DYNAMIC,)).see(row) == {}


def test_a_step_without_the_number_keeps_an_alarm_as_it_is():
    failing = {"entropy/mean": 0.05} | TARGET
    lasted, notes = play(course((12, failing), (7, {"entropy/mean": None} | TARGET), (1, failing)))
    assert lasted["entropy"] == [10, 11, 12, 20]
    assert len(notes) == 1


def test_a_run_that_goes_on_has_the_alarms_it_would_have_had():
    parts = [(20, TARGET)]
    for failing, _, _ in FAILURES.values():
        parts += [(12, TARGET | failing), (9, TARGET)]
    rows = course(*parts)
    whole = Alarms(AlarmsConfig(), (DYNAMIC,))
    expected = [whole.see(row) for row in rows]
    assert {name for said in expected for name, value in said.items() if value} == {f"alarm/{name}" for name in ALARMS}
    for stop in range(0, len(rows), 7):
        notes = []
        later = Alarms(AlarmsConfig(), (DYNAMIC,), notes.append)
        later.recall([json.loads(json.dumps(row)) for row in rows[:stop]])
        assert notes == [], "what began before is not told again"
        assert [later.see(row) for row in rows[stop:]] == expected[stop:], stop


def test_none_acts_unless_it_is_named():
    rows = course((20, {}), (10, {"length/mean": 100.0}))
    for stop, expected in (((), False), (("mismatch",), False), (("mismatch", "length"), True)):
        alarms = Alarms(AlarmsConfig(stop=stop), (DYNAMIC,))
        for row in rows[:20]:
            alarms.see(row)
        assert alarms.why_stop() is None
        for row in rows[20:]:
            alarms.see(row)
        assert (alarms.why_stop() is not None) == expected
    assert alarms.why_stop().startswith("alarm length: mean length 100 tokens")
    assert "alarms.stop" in alarms.why_stop()


def test_those_that_last_are_shown_with_their_newest_value():
    shown = []
    alarms = Alarms(AlarmsConfig(), (DYNAMIC,), show=shown.append)
    rows = course((20, {}), (6, {"length/mean": lambda place: 100.0 - place}), (10, {}))
    for row in rows:
        alarms.see(row)
    assert shown[22] == ()
    assert shown[23][0].startswith("length: mean length 159 tokens")
    assert shown[25][0].startswith("length: mean length 97 tokens")
    assert shown[-1] == ()
    again = Alarms(AlarmsConfig(), (DYNAMIC,), show=shown.append)
    again.recall(rows[:25])
    assert shown[-1] == shown[24]


@pytest.mark.parametrize("name", ["arithmetic-smollm2", "gsm8k-smollm2", "demo"])
def test_the_healthy_runs_that_were_measured_have_none(name):
    rows = [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert len(train) > 2
    lasted, notes = play(train, stages=load_config(ROOT / f"configs/{name}.yaml").stages)
    assert (lasted, notes) == ({}, [])


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"stop": ["entrpy"]}, "'entrpy' is no alarm; the alarms are entropy, language"),
        ({"stop": ["length"], "length": None}, "stop: 'length' is off (length: null)"),
        ({"stop": ["entropy"], "entropy_band": None, "entropy_drift": None}, "stop: 'entropy' is off"),
        ({"entropy_band": [0.5, 0.9]}, "entropy_band: [0.5, 0.9] must be multiples around 1"),
    ],
)
def test_impossible_settings_are_refused(keys, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        AlarmsConfig(**keys)


def test_each_can_be_switched_off():
    off = {name: None for name in ALARMS if name != "entropy"} | {"entropy_band": None, "entropy_drift": None}
    assert watches(AlarmsConfig(**off)) == {}
