"""The report in a real Chromium: it opens, filters, searches and colours as a Python count says, and asks for nothing.

Skips where there is no chromium or no playwright (benchmarks/report.py says what to install)."""

import os
import random
import re
from collections import Counter

import pytest
from fake_samples import HOSTILE, group, write_run, write_samples, write_step

from benchmarks.report import launched, missing, opened
from trainer.report.__main__ import report

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no browser: {missing()}")
OPEN_SECONDS = 2.0 * (4 if os.environ.get("CI") else 1)
MANY = 50_000


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """(the page's path, [(group, sample), …] in the order of the files)."""
    run = write_run(tmp_path_factory.mktemp("report") / "first", steps=40)
    groups = write_samples(run, steps=12, groups=5, size=4)
    hostile = group(random.Random(3), 13, 0, 3, 200)
    hostile["prompt"] |= {"id": HOSTILE[0], "question": HOSTILE[1], "answer": HOSTILE[0]}
    hostile["samples"][0] |= {"text": "😀" + "".join(HOSTILE), "detail": HOSTILE[1], "ends": [1, 20, 30], "logprob": [-1, -2, -3]}
    hostile["samples"][0] |= {"entropy": None, "tokens": 3, "advantage": None}
    hostile["samples"][1]["text"] = (
        "Then \\(\\frac{1}{2}\\) and \\(\\unknowncommand{x}\\) and $\\constructor$ and \\boxed{\\frac{3}{4}}."
    )
    write_step(run, 13, [hostile])
    path, _ = report([run])
    return path, [(each, sample) for each in [*groups, hostile] for sample in each["samples"]]


@pytest.fixture
def page(browser, recorded):
    with opened(browser, recorded[0]) as found:
        yield found.page
        assert found.errors == []
        assert found.requests == []


def count(page) -> int:
    page.wait_for_function("!browser.searching")
    shown = page.inner_text("#found")
    return int(re.match(r"([\d,]+) of", shown)[1].replace(",", ""))


def chip(page, facet: str, label: str) -> None:
    page.click(f'#facets [data-facet="{facet}"][data-value="{label}"]')


def chosen(page) -> int:
    return page.evaluate("browser.row")


def shown(page, row: int):
    page.wait_for_selector(f'#sample[data-row="{row}"]')
    return page.locator("#sample")


def test_it_opens_without_a_complaint_or_a_request(browser, recorded):
    with opened(browser, recorded[0]) as found:
        assert found.page.title() == "first"
        titles = found.page.locator(".chart strong").all_inner_texts()
        assert titles[:4] == ["Accuracy", "Entropy", "Response length", "Verdicts"]
        assert "50 %" in found.page.inner_text("#runs")
        assert "steps 3 to 5" in found.page.inner_text("#alarms")
        assert found.page.evaluate("window.pwned") is None
        # The policy holds: neither a request nor a script from within passes.
        found.page.evaluate("fetch('https://example.org/').catch(() => 0)")
        found.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'pwned = 3'}))")
        assert found.page.evaluate("window.pwned") is None
        assert all("Content Security Policy" in error or "Content-Security-Policy" in error for error in found.errors)
        assert len(found.errors) >= 2
        assert found.requests == []


def test_each_filter_lists_what_a_count_says(page, recorded):
    samples = recorded[1]
    assert count(page) == len(samples)
    for facet, value in (
        ("reason", lambda group, sample: sample["reason"]),
        ("fate", lambda group, sample: group["fate"]),
        ("source", lambda group, sample: group["prompt"]["source"]),
        ("stage", lambda group, sample: group["stage_name"]),
        ("finish", lambda group, sample: sample["finish"]),
        ("languages", lambda group, sample: "mixed" if sample["mixed"] else "not mixed"),
        (
            "verdict",
            lambda group, sample: "no verdict" if sample["reason"] == "unjudged" else "right" if sample["right"] else "wrong",
        ),
    ):
        counts = Counter(value(*each) for each in samples)
        for label, expected in counts.items() if len(counts) > 1 else ():
            chip(page, facet, label)
            assert count(page) == expected, (facet, label)
            chip(page, facet, label)
    # Of one facet several values are any of them, of several facets each must hold.
    chip(page, "reason", "wrong")
    chip(page, "reason", "format")
    chip(page, "fate", "trained")
    expected = sum(sample["reason"] in ("wrong", "format") and group["fate"] == "trained" for group, sample in samples)
    assert count(page) == expected
    page.click("#clear")
    assert count(page) == len(samples)
    page.fill("#step-from", "3")
    page.fill("#step-to", "5")
    assert count(page) == sum(3 <= group["step"] <= 5 for group, _ in samples)
    page.fill("#tokens-from", "150")
    page.fill("#tokens-to", "200")
    assert count(page) == sum(3 <= group["step"] <= 5 and 150 <= sample["tokens"] <= 200 for group, sample in samples)


@pytest.mark.parametrize(
    "query", ["the sign of the LAST factor", "求导", "\\frac", "train-0001", "nowhere to be found", "x^2 - 4x", "is not '"]
)
def test_search_finds_what_a_count_says(page, recorded, query):
    def has(group, sample):
        prompt = group["prompt"]
        return any(
            query.lower() in text.lower()
            for text in (prompt["question"], prompt["answer"], prompt["id"], sample["text"], sample["detail"])
        )

    page.keyboard.press("/")
    page.keyboard.type(query)
    page.wait_for_function(f"browser.query === {query!r}" if "\\" not in query else "browser.query.startsWith('\\\\')")
    assert count(page) == sum(has(*each) for each in recorded[1])


def test_rows_are_sorted_and_what_has_no_value_is_last(page, recorded):
    samples = recorded[1]
    page.select_option("#sort", "advantage")
    rows = page.evaluate("[...browser.order]")
    known = [samples[row][1]["advantage"] for row in rows if samples[row][1]["advantage"] is not None]
    assert known == sorted(known)
    assert samples[rows[-1]][1]["advantage"] is None
    page.click("#descending")
    rows = page.evaluate("[...browser.order]")
    assert samples[rows[0]][1]["advantage"] == max(known)
    assert samples[rows[-1]][1]["advantage"] is None


def test_the_list_holds_only_what_is_in_sight(page, recorded):
    page.evaluate("document.getElementById('list').scrollTop = 1e9")
    page.wait_for_selector(f"#option-{len(recorded[1]) - 1}")
    assert page.locator(".row").count() < 40


def test_keys(page, recorded):
    first = chosen(page)
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("k")
    assert chosen(page) == first + 1
    group, sample = recorded[1][chosen(page)]
    text = shown(page, chosen(page)).inner_text()
    assert group["prompt"]["id"] in text
    assert f"version {sample['version']}" in text
    page.keyboard.press("]")
    assert chosen(page) == first + 2
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("jjk")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.fill("#text", "")
    page.keyboard.press("Escape")
    page.keyboard.press("End")
    assert chosen(page) == len(recorded[1]) - 1
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.evaluate("document.getElementById('charts').querySelector('svg').focus()")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".crosshair line")
    assert page.locator(".crosshair line").count() > 5


def test_thinking_is_folded_until_it_is_asked_for(page, recorded):
    row = next(at for at, (_, sample) in enumerate(recorded[1]) if "</think>" in sample["text"])
    page.evaluate(f"chooseRow({row})")
    fold = shown(page, row).locator("details")
    assert fold.get_attribute("open") is None
    page.keyboard.press("f")
    page.wait_for_selector("details[open] .thinking")
    page.keyboard.press("m")
    page.keyboard.press("m")
    page.wait_for_selector("#sample math")


def test_a_formula_that_is_not_known_shows_its_source(page, recorded):
    row = len(recorded[1]) - 2
    page.evaluate(f"chooseRow({row})")
    sample = shown(page, row)
    assert sample.locator("math").count() == 2
    assert sample.locator("math mfrac").count() == 2
    assert sample.locator(".formula-source").all_inner_texts() == ["\\(\\unknowncommand{x}\\)", "$\\constructor$"]


def test_hostile_text_is_shown_as_text(page, recorded):
    row = len(recorded[1]) - 3
    page.evaluate(f"chooseRow({row})")
    text = shown(page, row).inner_text()
    for each in HOSTILE[:2]:
        assert each in text
    assert page.locator("#sample img, #sample script").count() == 0
    assert page.evaluate("window.pwned") is None


def test_tokens_are_coloured_by_their_values(page, recorded):
    row = len(recorded[1]) - 3
    page.evaluate(f"chooseRow({row})")
    shown(page, row)
    page.keyboard.press("t")
    page.wait_for_selector(".token")
    tokens = page.locator(".token")
    assert tokens.all_text_contents() == ["😀", HOSTILE[0][:19], HOSTILE[0][19:29]]
    assert [re.search(r"l(\d+)$", each.get_attribute("class"))[1] for each in tokens.all()] == ["2", "4", "6"]
    assert "log-probability" in page.inner_text(".coloring")
    tokens.nth(1).hover()
    page.wait_for_selector("#tip:not([hidden])")
    assert "−2.000" in page.inner_text("#tip")
    page.keyboard.press("t")
    page.wait_for_function("document.querySelector('.coloring').textContent.includes('not scored')")
    page.keyboard.press("t")
    page.wait_for_function("document.querySelector('.coloring').textContent.includes('not trained on')")
    page.keyboard.press("t")
    page.wait_for_selector(".coloring", state="detached")


def test_what_repeats_and_what_is_foreign_is_marked(page, recorded):
    for kind, has in (
        ("loop", lambda sample: sample["reason"] == "repetition"),
        ("foreign", lambda sample: "所以答案就是这样的" in sample["text"]),
    ):
        row = next(at for at, (group, sample) in enumerate(recorded[1]) if has(sample) and "</think>" in sample["text"])
        page.evaluate(f"browser.unfolded = true; chooseRow({row})")
        shown(page, row)
        page.wait_for_selector(f".text mark.{kind}")
    assert page.locator(".text mark.foreign").first.inner_text() == "所以答案就是这样的"


def test_dark_is_the_system_s_or_the_reader_s(browser, recorded):
    def paper(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with opened(browser, recorded[0], scheme="dark") as found:
        assert paper(found.page) == "rgb(17, 21, 28)"
        found.page.click("#theme")
        assert paper(found.page) == "rgb(246, 247, 249)"
        found.page.click("#theme")
        assert paper(found.page) == "rgb(17, 21, 28)"


def test_axis_smoothing_and_runs(browser, recorded, tmp_path):
    second = write_run(tmp_path / "second", steps=30)
    path, _ = report([recorded[0].parent, second], tmp_path / "both.html")
    with opened(browser, path) as found:
        page = found.page
        lines = "document.querySelector('[data-title=Entropy]').querySelectorAll('path.line:not(.raw)').length"
        assert page.evaluate(lines) == 4
        assert page.locator("#samples-note").count() == 1
        page.click("#run-legend .chip >> text=second")
        assert page.evaluate(lines) == 2
        before = page.locator("[data-title=Entropy] path.line:not(.raw)").first.get_attribute("d")
        page.evaluate("const s = document.getElementById('smoothing'); s.value = 21; s.dispatchEvent(new Event('input'))")
        page.wait_for_function("view.smoothing === 21")
        page.wait_for_function(
            f"document.querySelector('[data-title=Entropy] path.line:not(.raw)').getAttribute('d') !== {before!r}"
        )
        page.click("text=prompts drawn >> nth=0")
        assert page.evaluate("view.axis") == "drawn"
        assert page.inner_text("[data-title=Entropy] .tick-x >> nth=-1") == "400"
        assert found.errors == []


def test_a_run_without_samples_says_so(browser, tmp_path):
    path, _ = report([write_run(tmp_path / "run")])
    with opened(browser, path) as found:
        assert "No samples were recorded" in found.page.inner_text("#samples")
        found.page.keyboard.press("j")
        assert found.errors == []


def test_fifty_thousand_samples_open_in_time(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=100)
    draw = random.Random(5)
    # The same groups come again: a piece is packed by itself, so the page weighs what it would with others.
    groups = [group(draw, 1, 0, 10, 1850, detailed=False) for _ in range(100)]
    for step in range(1, 101):
        write_step(run, step, [each | {"step": step} for each in draw.sample(groups, MANY // 1000)])
    path, _ = report([run])
    with opened(browser, path) as found:
        assert found.seconds < OPEN_SECONDS
        assert count(found.page) == MANY
        assert found.page.evaluate("performance.getEntriesByName('interactive')[0].startTime") < 1000 * OPEN_SECONDS
        found.page.evaluate("document.getElementById('list').scrollTop = 1e9")
        found.page.wait_for_selector(f"#option-{MANY - 1}")
