"""Tables and files say everything: who was timed, who was not and why, and what the figures mean."""

from __future__ import annotations

import itertools
import json

import pytest
from fakes import CASE, gate, measured, result

from benchmarks.kernels import report
from benchmarks.kernels.gates import judge
from benchmarks.kernels.plot import FLOOR, Panel, draw, draw_panel, panels, spread_out


def example():
    return result(
        measured("torch eager", 45.0, errors={"logprob": 1e-6, "d_logits": 2e-3}),
        measured("keju", 10.0, extra_bytes=155_000_000, returned_bytes=155_000_000),
        measured("peer A", None, kind="peer", reason="not installed"),
        measured("peer B", None, kind="peer", reason="not installed"),
        measured("peer C", None, kind="peer", reason="wrong: logprob is off by 3"),
        floor_ms=8.0,
        copy_bandwidth=4.3e12,
    )


def test_the_table_is_sorted_aligned_and_leaves_nobody_out():
    lines = report.case_table(example()).splitlines()
    assert lines[0].startswith(CASE.name)
    assert "4,300 GB/s" in lines[0]
    assert [line.split()[0] for line in lines[2:4]] == ["keju", "torch"]
    assert len({line.index(column) for line in lines[2:4] for column in ("loss",)}) == 1
    assert "80%" in lines[2]
    assert "155 MB" in lines[2]
    assert "4.50" in lines[3]
    assert lines[4:] == ["  not installed: peer A 1.0; peer B 1.0", "  wrong: logprob is off by 3: peer C 1.0"]


def test_a_skipped_case_says_why():
    assert report.case_table(result(skipped="needs 40 GiB")).splitlines() == [CASE.name, "  skipped: needs 40 GiB"]


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1_000, "1 kB"), (2_491_000_000, "2.49 GB"), (155_700_000, "156 MB")]
)
def test_sizes(count, text):
    assert report.size(count) == text


def test_verdicts_are_told_apart_at_a_glance():
    line = gate(at_least=5.0)
    first, second = report.gate_lines([judge(line, example()), judge(gate(at_least=4.0), example())])
    assert first.startswith("BROKEN a line")
    assert "off by 10.0%" in first
    assert second.startswith("held")


def test_the_file_holds_all_figures_and_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    report.write(path, [example()], {"device": "a machine"}, "the command", [judge(gate(at_least=5.0), example())])
    record = json.loads(path.read_text(encoding="utf-8"))
    (case,) = record["cases"]
    keju = next(one for one in case["measurements"] if one["contender"] == "keju")
    assert keju["fraction_of_floor"] == 0.8
    assert keju["beyond_returned_bytes"] == 0
    assert case["case"]["name"] == CASE.name
    assert record["gates"][0]["state"] == "broken"
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"]


def test_slugs_are_file_names():
    assert report.slug("NVIDIA H200 NVL (80GB)") == "nvidia-h200-nvl-80gb"


def test_a_picture_has_a_panel_an_operation_and_the_floor_in_it(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "kernels.json"
    machine = {"device": "a machine", "date": "2026-01-01", "commit": "c", "torch": "2", "triton": "3"}
    report.write(path, [example()], machine, "the command")
    (panel,) = panels(json.loads(path.read_text(encoding="utf-8")))
    assert set(panel.lines) == {"keju", "torch eager", FLOOR}
    assert panel.lines["keju"] == {512: 1000 * 10.0 / 512}
    assert draw(path).stat().st_size > 10_000


def test_one_t_is_drawn_as_bars_and_several_as_lines(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots(1, 2)
    for ax, tokens in zip(axes, ([512], [512, 1024]), strict=True):
        times = {"keju": dict.fromkeys(tokens, 2.0), "torch eager": dict.fromkeys(tokens, 5.0), FLOOR: dict.fromkeys(tokens, 1.0)}
        draw_panel(ax, Panel("operation", "float32", times))
    bars, lines = axes
    assert [label.get_text() for label in bars.get_yticklabels()] == [FLOOR, "keju", "torch eager"]
    assert [patch.get_width() for patch in bars.patches] == [1.0, 2.0, 5.0]
    assert len(lines.lines) == 3
    assert not lines.patches


def test_labels_keep_their_distance_and_stay_inside():
    for heights in ([0.5] * 8, [0.0, 0.01, 0.02], [0.98, 0.99, 1.0], [0.1, 0.12, 0.8]):
        moved = spread_out(sorted(heights), 0.06)
        assert all(upper - lower >= 0.06 - 1e-9 for lower, upper in itertools.pairwise(moved))
        assert min(moved) >= 0
        assert max(moved) <= 1
    assert spread_out([0.2, 0.8], 0.06) == [0.2, 0.8]
