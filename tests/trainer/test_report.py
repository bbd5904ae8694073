"""The report's data: exact to what the run recorded, whatever is missing or hostile in it. The page: test_report_browser."""

import base64
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from fake_samples import HOSTILE, group, metrics_rows, write_run, write_samples, write_step

from kernels.backend import has_native
from rollout.errors import InputError
from rollout.reward.languages import foreign_spans, measure_languages
from trainer.report.__main__ import report, run_names
from trainer.report.charts import CHARTS, choose_charts
from trainer.report.curves import alarm_spans, numeric_columns, read_run
from trainer.report.marks import browser_places, find_loop
from trainer.report.sample_files import Survey, parse_group, plan_reading, survey, taken
from trainer.report.sample_store import ENDING


class Page(HTMLParser):
    """Scripts and styles of a page, by what an HTML parser makes of it."""

    def __init__(self, text: str):
        super().__init__()
        self.blocks: list[tuple[dict, str]] = []
        self.policy, self.open, self.tags = "", "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes, self.open = dict(attributes), tag
        self.tags.append((tag, attributes))
        if tag in ("script", "style"):
            self.blocks.append((attributes | {"tag": tag}, ""))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, text):
        if self.open in ("script", "style"):
            attributes, before = self.blocks[-1]
            self.blocks[-1] = (attributes, before + text)

    def block(self, identity: str) -> str:
        (found,) = (text for attributes, text in self.blocks if attributes.get("id") == identity)
        return found


def written(run, **options) -> Page:
    path, _ = report([run], **options)
    return Page(path.read_text(encoding="utf-8"))


def unpack(text: str):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def page_samples(page: Page) -> list[tuple[dict, dict, dict | None]]:
    """(row by column name, text record, tokens) of each sample, as the page would read them."""
    index = json.loads(page.block("data"))["samples"]
    texts = [unpack(page.block(f"texts-{place}")) for place in range(index["pieces"])]
    held = {attributes.get("id") for attributes, _ in page.blocks}
    tokens = [unpack(page.block(f"tokens-{place}")) if f"tokens-{place}" in held else None for place in range(index["pieces"])]
    found, seen = [], {}
    for row, at in enumerate(index["rows"]["group"]):
        place = seen[at] = seen.get(at, -1) + 1
        own = {key: values[at] for key, values in index["groups"].items()}
        values = {key: column[row] for key, column in index["rows"].items()}
        record, detail = texts[own["piece"]][own["place"]], None
        if own["detail"]:
            detail = tokens[own["piece"]][own["place"]][place]
        names = {"reason": index["reasons"][values["reason"]], "fate": index["fates"][own["fate"]]}
        names |= {"prompt": index["prompts"][own["prompt"]], "question": record["question"], "answer": record["answer"]}
        found.append((own | values | names, record["samples"][place], detail))
    return found


def test_every_sample_is_in_the_page_as_recorded(tmp_path):
    run = write_run(tmp_path / "run")
    groups = write_samples(run, steps=3, groups=4, size=3)
    recorded = [(group, sample) for group in groups for sample in group["samples"]]
    for (group_, sample), (row, text, tokens) in zip(recorded, page_samples(written(run)), strict=True):
        assert (text["text"], text["detail"]) == (sample["text"], sample["detail"])
        assert (row["step"], row["fate"], row["reason"]) == (group_["step"], group_["fate"], sample["reason"])
        assert (row["question"], row["answer"]) == (group_["prompt"]["question"], group_["prompt"]["answer"])
        assert row["prompt"][::2] == [group_["prompt"]["id"], group_["prompt"]["source"]]
        assert (row["tokens"], row["version"], row["mixed"]) == (sample["tokens"], sample["version"], int(sample["mixed"]))
        assert row["verdict"] == (2 if sample["reason"] == "unjudged" else int(sample["right"]))
        assert row["advantage"] == sample["advantage"]
        ends = [sum(tokens["ends"][: place + 1]) for place in range(len(tokens["ends"]))]
        assert ends == sample["ends"]
        assert [value / 1000 for value in tokens["logprob"]] == sample["logprob"]
        assert (tokens["entropy"] and [value / 1000 for value in tokens["entropy"]]) == sample["entropy"]
        assert row["logprob"] == pytest.approx(sum(sample["logprob"]) / len(ends), abs=6e-4)
        assert len(row["ending"]) <= ENDING


def test_samples_of_older_files_live_without_their_fields(tmp_path):
    run = write_run(tmp_path / "run")
    write_step(run, 1, [{"step": 1, "samples": [{"text": "only this"}, {"text": "", "ends": [], "logprob": None}]}])
    (row, text, tokens), _ = page_samples(written(run))
    assert text == {"text": "only this", "detail": ""}
    assert tokens is None
    assert (row["verdict"], row["tokens"], row["version"], row["advantage"]) == (2, None, None, None)
    assert (row["reason"], row["fate"]) == ("not recorded", "not recorded")


@pytest.mark.parametrize(
    "detail",
    [
        {"ends": [1, 9], "logprob": [-0.1, -0.2]},  # behind the text's end
        {"ends": [2, 1], "logprob": [-0.1, -0.2]},
        {"ends": ["1", None], "logprob": [-0.1, -0.2]},
    ],
)
def test_ends_that_are_no_places_of_the_text_are_left_out(tmp_path, detail):
    run = write_run(tmp_path / "run")
    write_step(run, 1, [{"step": 1, "samples": [{"text": "ab", **detail}]}])
    assert page_samples(written(run))[0][2] is None


def test_places_are_counted_as_a_browser_counts(tmp_path):
    assert browser_places("a😀b", [1, 2, 3]) == [1, 3, 4]
    run = write_run(tmp_path / "run")
    write_step(run, 1, [{"step": 1, "samples": [{"text": "a😀b", "ends": [1, 2, 3], "logprob": [-1, None, -0.5]}]}])
    _, _, tokens = page_samples(written(run))[0]
    assert tokens == {"ends": [1, 2, 1], "logprob": [-1000, None, -500], "entropy": None}


def test_a_torn_and_an_unreadable_file_and_a_bad_line_are_told_and_passed_over(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, steps=3, groups=6, size=4)
    whole = (run / "samples/step-000001.jsonl.gz").read_bytes()
    (run / "samples/step-000001.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (run / "samples/step-000002.jsonl.gz").write_bytes(b"no gzip at all")
    (run / "samples/step-000004.jsonl.gz").write_bytes(b"")
    lines = gzip.decompress((run / "samples/step-000003.jsonl.gz").read_bytes()).splitlines()
    (run / "samples/step-000003.jsonl.gz").write_bytes(gzip.compress(b"\n".join([*lines[:5], b'{"step": "three"}'])))
    path, notes = report([run])
    assert [re.search(r"step-00000(\d)", note)[1] for note in notes] == ["1", "2", "4", "3"]
    assert "1 lines are no groups" in notes[3]
    page = Page(path.read_text(encoding="utf-8"))
    assert json.loads(page.block("data"))["samples"]["notes"] == list(notes)
    steps = [row["step"] for row, _, _ in page_samples(page)]
    assert steps.count(3) == 5 * 4
    assert 0 < steps.count(1) < 6 * 4
    assert 2 not in steps


def test_a_lone_surrogate_and_a_nan_break_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    line = '{"step": 1, "samples": [{"text": "a\\ud800b", "advantage": NaN, "ends": [1, 2, 3], "logprob": [NaN, -1, -Infinity]}]}'
    path = write_step(run, 1, [])
    path.write_bytes(gzip.compress(line.encode()))
    (row, text, tokens), *_ = page_samples(written(run))
    assert len(text["text"]) == 3
    assert row["advantage"] is None
    assert tokens["logprob"] == [None, -1000, None]


def test_hostile_text_stays_data(tmp_path):
    run = write_run(tmp_path / HOSTILE[1].replace("/", ""))
    hostile = group(random.Random(0), 1, 0, 1, 50)
    hostile["prompt"] |= {"id": HOSTILE[0], "question": HOSTILE[0], "source": HOSTILE[1]}
    hostile["stage_name"] = hostile["fate"] = HOSTILE[2]
    hostile["samples"][0] |= {"text": "".join(HOSTILE), "detail": HOSTILE[0], "reason": HOSTILE[1], "ends": None}
    write_step(run, 1, [hostile])
    page = written(run)
    scripts = [attributes for attributes, _ in page.blocks if attributes["tag"] == "script"]
    assert [each.get("type") for each in scripts] == ["application/json", None, "text/plain"]
    assert not [attributes for tag, attributes in page.tags if tag == "img" or any(name.startswith("on") for name in attributes)]
    ((row, text, _),) = page_samples(page)
    assert text["text"] == "".join(HOSTILE)
    assert row["prompt"][0] == HOSTILE[0]


def test_the_policy_allows_the_two_blocks_of_the_page_and_no_request(tmp_path):
    page = written(write_run(tmp_path / "run"))
    rules = dict(rule.strip().split(" ", 1) for rule in page.policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (code,) = (text for attributes, text in page.blocks if attributes["tag"] == tag and "type" not in attributes)
        assert rules[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
    assert not set(rules) & {"connect-src", "frame-src", "font-src"}
    assert not [
        attributes for _, attributes in page.tags if re.match("https?:", attributes.get("src") or attributes.get("href") or "")
    ]


def test_too_many_samples_are_thinned_evenly_and_counted(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, steps=8, groups=10, size=2, length=100)
    page = written(run, samples=40)
    found = page_samples(page)
    steps = [row["step"] for row, _, _ in found]
    assert len(found) == 40
    assert {steps.count(step) for step in range(1, 9)} <= {4, 6}
    assert json.loads(page.block("data"))["samples"]["found_groups"] == 80


def test_what_fits_is_planned_from_the_survey():
    def found(samples, text_bytes, tokens):
        return [Survey((), 100, samples, text_bytes, tokens, ())]

    assert plan_reading(found(100, 1e5, 1e4), 1000, 100).groups == 1
    assert plan_reading(found(100, 1e5, 1e4), 1000, 100).detail == 1
    assert plan_reading(found(4000, 1e5, 0), 1000, 100).groups == 0.25
    heavy = plan_reading(found(1000, 1e9, 1e9), 1000, 100)
    assert heavy.groups * 1e9 * 0.45 == pytest.approx(75e6)
    assert heavy.groups * heavy.detail * 1e9 * 5 == pytest.approx(25e6)
    assert plan_reading([], 1000, 100).groups == 1


def test_taken_is_even():
    for part in (1.0, 0.5, 0.3, 0.01):
        chosen = [place for place in range(1000) if taken(place, part)]
        assert len(chosen) == round(1000 * part)
        assert max((b - a for a, b in itertools.pairwise(chosen)), default=1) <= math.ceil(1 / part)


def test_the_survey_counts_groups_without_samples_folder_too(tmp_path):
    assert survey(tmp_path) == Survey((), 0, 0.0, 0.0, 0.0, ())
    write_samples(tmp_path, steps=2, groups=3, size=4, length=200)
    found = survey(tmp_path)
    assert (found.groups, found.samples, len(found.files)) == (6, 24, 2)


def test_what_is_no_group_is_none():
    for line in (b"", b"[]", b'{"step": 1}', b'{"step": 1, "samples": []}', b'{"step": 1, "samples": [{"text": 3}]}', b"\xff"):
        assert parse_group(line) is None


def test_a_loop_is_found_in_characters():
    if not has_native():
        pytest.skip("the native kernel is not built, so only outputs refused for repetition are looked at")
    text = "Let us begin. " + "and the same again, " * 12 + "done"
    start, stop, period, count = find_loop(text, "wrong")
    assert (period, count) == (20, 12)
    assert text[start:stop] == " " + ("and the same again, " * 12)[: stop - start - 1]
    assert find_loop("No line of this text says anything a second time, and it is long enough to be looked at.", "wrong") == []
    passage = "".join(random.Random(1).choices("abcdefgh ", k=300))
    start, stop, period, count = find_loop(passage + "|" + passage, "wrong")
    assert ((start, stop), period, count) == ((301, 601), 0, 0)


@pytest.mark.parametrize(
    ("text", "question", "foreign"),
    [
        ("the answer 所以 is 7", "How many?", ["所以"]),
        ("所以 the answer", "求导数", ["the", "answer"]),
        ("所以 $the answer$ sin", "求 sin 的导数", []),
        ("Ａnswer 😀 然后 ok then", "Which number?", ["然后"]),
        ("no foreign word", "Which?", []),
        ("", "", []),
    ],
)
def test_foreign_words_are_found_where_they_stand(text, question, foreign):
    spans = foreign_spans(text, question)
    assert [text[start:stop] for start, stop in spans] == foreign
    assert sum(map(len, foreign)) == measure_languages(text, question).foreign_letters


def test_curves_are_the_rows(tmp_path):
    run = write_run(tmp_path / "run", steps=30)
    data = read_run(run, "mine")
    train = [row for row in metrics_rows(30) if row["kind"] == "train"]
    assert data["steps"] == list(range(1, 31))
    assert data["drawn"] == [row["ledger/drawn"] for row in train]
    for key in ("reward/accuracy", "entropy/mean", "length/mean"):
        assert data["columns"][key] == pytest.approx([row[key] for row in train], rel=1e-5)
    assert data["alarms"] == [{"name": "entropy", "spans": [[3, 5]]}]
    assert data["ledger"] == {"drawn": 300, "trained": 180, "recovered": 30, "uniform": 90}
    assert data["evaluations"][0]["values"] == [0.25, 0.5]
    assert data["seconds"]["other"] == [0.5] * 30
    assert [(band["first"], band["last"]) for band in data["bands"]] == [(0, 24), (25, 29)]


def test_alarms_that_last_at_the_end_and_come_back():
    rows = [{"step": step, "alarm/length": int(step in (2, 4, 5))} for step in range(1, 6)]
    assert alarm_spans(rows) == [{"name": "length", "spans": [[2, 2], [4, 5]]}]
    assert alarm_spans([{"step": 1}]) == []


def test_columns_keep_gaps_and_leave_out_what_is_no_number():
    columns = numeric_columns([{"step": 1, "a": 1 / 3, "b": "x", "c": True}, {"step": 2, "a": None, "time/step": 3.0}])
    assert columns == {"a": [0.333333, None]}


def test_a_chart_is_drawn_told_as_constant_or_told_as_missing():
    rising = [step / 10 for step in range(10)]
    chosen = choose_charts(
        [{"reward/accuracy": rising, "clip/low": [0.0] * 10, "verdict/wrong": rising, "verdict/right": rising}], False
    )
    assert [chart["title"] for chart in chosen["charts"]] == ["Accuracy", "Verdicts"]
    assert [series["label"] for series in chosen["charts"][1]["series"]] == ["right", "wrong"]
    assert chosen["constant"] == [["Clipped tokens", "low", 0.0]]
    assert len(chosen["missing"]) == len(CHARTS) - 3
    # Two runs that each hold still at a value of their own do differ.
    assert [chart["title"] for chart in choose_charts([{"lr": [1.0] * 9}, {"lr": [2.0] * 9}], False)["charts"]] == [
        "Learning rate"
    ]
    assert choose_charts([{"lr": [1.0] * 2}], False)["constant"] == []


def test_names_tell_runs_apart(tmp_path):
    assert run_names([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert run_names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
    assert run_names([tmp_path / "x", tmp_path / "x"]) == ["x", "x"]


def test_a_run_without_samples_or_summary_has_a_page(tmp_path):
    data = json.loads(written(write_run(tmp_path / "run"), out=tmp_path / "page.html").block("data"))
    assert data["samples"]["rows"]["group"] == []
    assert data["runs"][0]["about"] == {}


def test_what_is_known_of_model_and_machine_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("model:\n  path: models/tiny\n")
    (run / "summary.json").write_text(json.dumps({"machine": {"commit": "abc", "cpu": "EPYC", "cores": "2"}}))
    assert read_run(run, "")["about"] == {"model": "models/tiny", "commit": "abc", "cpu": "EPYC", "cores": "2"}
    (run / "config.yaml").write_text("- [torn")
    (run / "summary.json").write_text("[]")
    assert read_run(run, "")["about"] == {}


def test_the_same_run_gives_the_same_page(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, steps=2, groups=2, size=2)
    first, _ = report([run], tmp_path / "a.html")
    second, _ = report([run], tmp_path / "b.html")
    assert first.read_bytes() == second.read_bytes()


def test_bad_input_is_one_line_and_code_2(tmp_path):
    run = write_run(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    young = tmp_path / "young"
    young.mkdir()
    (young / "metrics.jsonl").write_text('{"kind": "eval", "step": 0, "pass@1": 0.5}\n')
    for folder, words in ((tmp_path / "nowhere", "no such folder"), (empty, "no such file"), (young, "no finished step")):
        with pytest.raises(InputError, match=words):
            report([run, folder])
    for place in (tmp_path / "absent/page.html", empty):
        with pytest.raises(InputError, match="cannot write the page"):
            report([run], place)
    assert not list(tmp_path.glob("*.tmp"))
    for arguments in ([str(tmp_path / "nowhere")], [str(run), "--samples", "0"], []):
        command = [sys.executable, "-m", "trainer.report", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert len(ended.stderr.splitlines()) == 1
        assert ended.stderr.startswith("keju: error:")


def test_the_command_tells_of_its_work_and_where_the_page_is(tmp_path):
    run = write_run(tmp_path / "run")
    write_samples(run, steps=2, groups=2, size=2)
    command = [sys.executable, "-m", "trainer.report", str(run), "--out", str(tmp_path / "page.html")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(str(tmp_path / "page.html"))
    assert "sample file 1 of 2" in ended.stderr
