"""The report in a real Chromium: it opens, filters, searches and colours as a Python count says, and asks for nothing.

Skips where there is no chromium or no playwright (benchmarks/report.py says what to install)."""

import os
import random
import re
from collections import Counter

import pytest
from fake_samples import HOSTILE, group, write_run, write_samples, write_step

from benchmarks.report import launched, missing, opened, wait_until
from trainer.report.__main__ import report
from trainer.report.curves import read_run
from trainer.report.page import write_page
from trainer.report.sample_files import plan_reading, survey
from trainer.report.sample_store import SampleStore

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"no browser: {missing()}")
OPEN_SECONDS = 2.0
MANY = 50_000
RESET = (
    "Object.assign(browser, {coloring: 0, unfolded: false, formulas: true}); clearFilters(); chooseRow(0); "
    "document.activeElement.blur()"
)


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
    hostile["samples"][0] |= {
        "text": "😀" + "".join(HOSTILE),
        "detail": HOSTILE[1],
        "ends": [1, 1, 20, 30],
        "logprob": [-0.5, -1, -2, -3],
    }
    hostile["samples"][0] |= {"entropy": None, "tokens": 4, "advantage": None}
    hostile["samples"][1]["text"] = (
        "Then \\(\\frac{1}{2}\\) and \\(\\unknowncommand{x}\\) and $\\constructor$ and \\boxed{\\frac{3}{4}}."
    )
    write_step(run, 13, [hostile])
    path, _ = report([run])
    return path, [(each, sample) for each in [*groups, hostile] for sample in each["samples"]]


@pytest.fixture(scope="module")
def opened_page(browser, recorded):
    with opened(browser, recorded[0]) as found:
        yield found


@pytest.fixture
def page(opened_page):
    """The page as it is when it opens: one is opened for all tests, as that takes most of their time."""
    page = opened_page.page
    page.evaluate(RESET)
    yield page
    assert opened_page.errors == []
    assert opened_page.requests == []


def count(page) -> int:
    wait_until(page, "!browser.searching")
    shown = page.inner_text("#found")
    return int(re.match(r"([\d,]+) of", shown)[1].replace(",", ""))


def chip(page, facet: str, label: str) -> None:
    page.evaluate(f"""document.querySelector('#facets [data-facet="{facet}"][data-value="{label}"]').click()""")


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


QUERIES = ("the sign of the LAST factor", "求导", "\\frac", "train-0001", "nowhere to be found", "x^2 - 4x", "is not '")


@pytest.mark.parametrize("query", QUERIES)
def test_search_finds_what_a_count_says(page, recorded, query):
    def has(group, sample):
        prompt = group["prompt"]
        texts = (prompt["question"], prompt["answer"], prompt["id"], sample["text"], sample["detail"])
        return any(query.lower() in text.lower() for text in texts)

    page.keyboard.press("/")
    page.keyboard.type(query)
    wait_until(page, "query => browser.query === query", query)
    found = sum(has(*each) for each in recorded[1])
    assert count(page) == found
    if found and query != "train-0001" and not query.startswith("\\"):
        page.keyboard.press("Escape")
        page.evaluate("browser.unfolded = true; browser.formulas = false; choose(0)")
        text = shown(page, chosen(page)).inner_text()
        hits = page.locator("#sample mark.hit").all_inner_texts()
        assert bool(hits) == (query.lower() in text.lower().split("question", 1)[1])
        assert {hit.lower() for hit in hits} <= {query.lower()}


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
    wait_until(page, "document.querySelectorAll('.crosshair line').length > 5")


def test_the_cursor_stands_in_all_charts_and_reads_the_values(page):
    page.evaluate("scrollTo(0, 0)")
    chart = page.locator("[data-title=Accuracy] svg.plot")
    place = page.evaluate("plots[0].x(20)")
    chart.hover(position={"x": place, "y": 90})
    wait_until(page, "document.querySelector('[data-title=Accuracy] .legend').textContent.includes('25 %')")
    page.wait_for_timeout(150)
    assert page.locator(".crosshair line").count() == page.evaluate("plots.length")
    assert "step 20" in chart.text_content()
    assert "0.55" in page.inner_text("[data-title=Entropy] .legend")
    assert "70" in page.inner_text("[data-title='Response length'] .legend")


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
    # Two tokens make the first character: they stand together, in the colour of the less likely one.
    tokens.first.hover()
    wait_until(page, "document.getElementById('tip').textContent.includes('token 2 of 4')")
    assert "token 1 of 4" in page.inner_text("#tip")
    tokens.nth(1).hover()
    wait_until(page, "document.getElementById('tip').textContent.includes('−2.000')")
    page.keyboard.press("t")
    wait_until(page, "document.querySelector('.coloring').textContent.includes('not scored')")
    page.keyboard.press("t")
    wait_until(page, "document.querySelector('.coloring').textContent.includes('not trained on')")
    page.keyboard.press("t")
    page.wait_for_selector(".coloring", state="detached")


def test_what_repeats_and_what_is_foreign_is_marked(page, recorded):
    foreign = "所以答案就是这样的"
    for kind, has in (
        ("loop", lambda sample: sample["reason"] == "repetition"),
        ("foreign", lambda sample: foreign in sample["text"]),
    ):
        samples = [sample for _, sample in recorded[1]]
        row = next(at for at, sample in enumerate(samples) if has(sample) and "</think>" in sample["text"])
        page.evaluate(f"browser.unfolded = true; chooseRow({row})")
        shown(page, row)
        page.wait_for_selector(f".text mark.{kind}")
    assert foreign in page.locator(".text mark.foreign").all_inner_texts()


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
        # Where the second run has ended it has no value; an evaluation is read with its own step.
        page.evaluate("setCursor(38)")
        wait_until(page, "document.querySelector('[data-title=Accuracy] .legend').textContent.includes('47.5 % –')")
        assert "50 % at 40 50 % at 30" in page.inner_text("[data-title=Accuracy] .legend")
        page.click("#run-legend .chip >> text=second")
        assert page.evaluate(lines) == 2
        path_of = "document.querySelector('[data-title=Entropy] path.line:not(.raw)').getAttribute('d')"
        before = page.evaluate(path_of)
        page.evaluate("const s = document.getElementById('smoothing'); s.value = 21; s.dispatchEvent(new Event('input'))")
        wait_until(page, "view.smoothing === 21")
        wait_until(page, f"document.querySelector('[data-title=Entropy] path.line:not(.raw)').getAttribute('d') !== {before!r}")
        page.click(".segmented >> text=prompts drawn")
        assert page.evaluate("view.axis") == "drawn"
        assert page.locator("[data-title=Entropy] .tick-x").last.text_content() == "400"
        assert found.errors == []


def test_what_all_questions_begin_with_is_left_out_of_the_list(browser, tmp_path):
    run = write_run(tmp_path / "run")
    asked = [f"State the final answer of this problem: 1{digit} + 4 =" for digit in range(3)]
    write_step(run, 1, [{"step": 1, "prompt": {"question": each}, "samples": [{"text": "14"}]} for each in asked])
    with opened(browser, report([run])[0]) as found:
        assert found.page.locator(".row-head").all_inner_texts() == [f"…1{digit} + 4 =" for digit in range(3)]


def test_a_run_without_samples_says_so(browser, tmp_path):
    path, _ = report([write_run(tmp_path / "run")])
    with opened(browser, path) as found:
        assert "No samples were recorded" in found.page.inner_text("#samples")
        found.page.keyboard.press("j")
        assert found.errors == []


class Repeated:
    """A store's samples so many times over, a step each: a page of their weight, without the time to pack as many others."""

    def __init__(self, store: SampleStore, times: int):
        self._index, own = store.index(), store.pieces
        self.pieces = own * times
        groups, rows = self._index["groups"], self._index["rows"]
        count = len(groups["run"])
        self._index["groups"] = {key: values * times for key, values in groups.items()}
        self._index["groups"]["step"] = [1 + time for time in range(times) for _ in range(count)]
        self._index["groups"]["piece"] = [len(own) * time + piece for time in range(times) for piece in groups["piece"]]
        self._index["rows"] = {key: values * times for key, values in rows.items()}
        self._index["rows"]["group"] = [count * time + group for time in range(times) for group in rows["group"]]
        self._index |= {"found_groups": count * times, "pieces": len(self.pieces)}

    def index(self) -> dict:
        return self._index


def test_fifty_thousand_samples_open_in_time(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=100)
    draw = random.Random(5)
    write_step(run, 1, [group(draw, 1, 0, 10, 1850, detailed=False) for _ in range(50)])
    store, found = SampleStore(), survey(run)
    store.add_run(0, run, found, plan_reading([found], MANY, 96))
    many = Repeated(store, MANY // 500)
    path = tmp_path / "many.html"
    write_page(path, [read_run(run, "many")], many)
    assert path.stat().st_size > 20e6
    with opened(browser, path) as found:
        # A machine that runs other things beside takes its time.
        busy = max(4 if os.environ.get("CI") else 1, os.getloadavg()[0] / os.cpu_count())
        assert found.seconds < OPEN_SECONDS * busy
        assert count(found.page) == MANY
        found.page.evaluate("document.getElementById('list').scrollTop = 1e9")
        found.page.wait_for_selector(f"#option-{MANY - 1}")
        # The last piece is read, though it stands last in the file.
        found.page.evaluate(f"chooseRow({MANY - 1})")
        shown(found.page, MANY - 1)
