"""The figures: their data exactly, their drawing by what a reader would miss (a line, a name, a legend over the data)."""

import json
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rollout.errors import InputError
from trainer.cli import run
from trainer.metrics import METRICS_FILE
from trainer.plot import main, plot
from trainer.plot_data import Band, block_edges, block_means, prepare, smooth, smoothing_window, stage_names
from trainer.plot_draw import DPI, FIGURES, STYLE

STAGES = (("grpo+ter", 4096, 2500.0), ("dapo", 8192, 3500.0), ("dapo", 16384, 6000.0))


def run_rows(steps: int, *, evaluations: bool = True, target: bool = True) -> list[dict]:
    """A run through three stages in which each value is a plain function of the step."""
    rows = [evaluation(0, 0.4)] if evaluations else []
    for step in range(1, steps + 1):
        stage = (step - 1) * len(STAGES) // steps
        name, context, length = STAGES[stage]
        row = {"kind": "train", "step": step, "stage": stage, "stage_name": name, "context": context}
        row |= {"entropy/mean": 0.55 + 0.3 * math.exp(-step / 8), "length/mean": length + step}
        row |= {"reward/accuracy": 0.5 + step / 2000}
        row |= {"ledger/drawn": 40 * step, "ledger/trained": 10 * step, "ledger/recovered": 6 * step, "ledger/uniform": 24 * step}
        row |= {"time/sample": 30.0, "time/update": 12.0, "time/step": 44.0}
        if target and stage == 0:
            row["entropy/target"] = 0.55
        rows.append(row)
        if evaluations and step % 10 == 0:
            rows.append(evaluation(step, 0.5))
    return rows


def evaluation(step: int, score: float) -> dict:
    return {"kind": "eval", "step": step, "name": "heldout", "pass@1": score, "time/evaluate": 35.0}


def drawn(name: str, rows: list[dict]) -> Figure:
    draw, size = FIGURES[name]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, prepare(rows))
        figure.canvas.draw()
    return figure


def is_painted(figure: Figure, box) -> bool:
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1]  # extents count from the bottom, pixels from the top
    return pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1), :3].min() < 200


def write(folder, rows: list[dict]):
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_data_is_sorted_by_step_with_gaps_where_a_row_lacks_a_value():
    data = prepare([{"kind": "train", "step": 2, "entropy/mean": 0.5}, {"kind": "train", "step": 1, "entropy/mean": None}])
    np.testing.assert_array_equal(data.steps, [1, 2])
    np.testing.assert_array_equal(data.entropy, [np.nan, 0.5])
    assert data.seconds == {}
    assert data.ledger == {}


def test_bands_part_stages_of_the_same_name():
    bands = prepare(run_rows(60)).bands
    assert [(band.stage, band.name, band.first, band.last, band.context) for band in bands] == [
        (0, "grpo+ter", 0, 19, 4096),
        (1, "dapo", 20, 39, 8192),
        (2, "dapo", 40, 59, 16384),
    ]


def test_evaluations_stand_at_the_prompts_drawn_by_their_step():
    rows = [*run_rows(20), evaluation(25, 0.7)]
    (series,) = prepare(rows).evaluations
    np.testing.assert_array_equal(series.steps, [0, 10, 20, 25])
    np.testing.assert_array_equal(series.drawn, [0, 400, 800, 800])


def test_time_adds_up_to_the_step_and_counts_evaluations_once():
    data = prepare(run_rows(10))
    assert set(data.seconds) == {"sample", "update", "evaluate", "other"}
    np.testing.assert_array_equal(data.seconds["evaluate"], [0.0] * 9 + [35.0])
    np.testing.assert_array_equal(data.seconds["other"][:9], [2.0] * 9)
    assert data.seconds["other"][9] == 0.0, "what the phases exceed the step by is never negative time"
    rows = run_rows(10)
    next(row for row in rows if row["kind"] == "train" and row["step"] == 10)["time/evaluate"] = 33.0
    assert prepare(rows).seconds["evaluate"].sum() == 33.0


def test_smoothing_neither_lags_nor_invents():
    np.testing.assert_allclose(smooth(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0, 5.0]), 3), [1.0, np.nan, 4.0, 4.0])
    ramp = np.arange(50.0)
    np.testing.assert_allclose(smooth(ramp, 9)[4:-4], ramp[4:-4])
    assert [smoothing_window(steps) for steps in (1, 23, 24, 60, 5000)] == [1, 1, 3, 5, 25]


def test_blocks_keep_the_whole_time():
    np.testing.assert_array_equal(block_means(np.array([1.0, 3.0, 5.0]), 2), [2.0, 5.0])
    np.testing.assert_array_equal(block_edges(np.array([0.5, 1.5, 2.5, 3.5]), 2), [0.5, 2.5, 3.5])
    values = np.arange(501.0)
    widths = np.diff(block_edges(np.arange(502) - 0.5, 5))
    assert (block_means(values, 5) * widths).sum() == pytest.approx(values.sum())


def test_a_stage_name_says_its_context_once():
    assert stage_names(Band(1, "dapo", 0, 1, 8192)) == ("dapo, 8K", "dapo")
    assert stage_names(Band(1, "dapo-8k", 0, 1, 8192)) == ("dapo-8k",)
    assert stage_names(Band(0, "demo", 0, 1, 512.0)) == ("demo, 512 tokens", "demo")
    assert stage_names(Band(0, "", 0, 1, float("nan"))) == ()


def test_the_target_is_drawn_where_it_is_set_and_only_there():
    axes = drawn("entropy.png", run_rows(60)).axes[0]
    target = next(patch for patch in axes.patches if patch.get_label() == "target 0.55")
    assert np.isfinite(target.get_data().values).sum() == 20
    labels = [text.get_text() for text in drawn("entropy.png", run_rows(60, target=False)).legends[0].get_texts()]
    assert labels == ["entropy, mean of 5 steps"]


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "recipe.png"])
@pytest.mark.parametrize("steps", [1, 60, 500])
def test_no_legend_lies_on_the_data_and_no_stage_name_on_another(name, steps):
    figure = drawn(name, run_rows(steps))
    renderer = figure.canvas.get_renderer()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    for axes in figure.axes:
        for legend in legends:
            assert not legend.get_window_extent(renderer).overlaps(axes.bbox)
        names = [artist.get_window_extent(renderer) for artist in axes.texts if artist.get_text()]
        assert names, "every band wide enough has its stage's name"
        assert all(is_painted(figure, name) for name in names), "a name outside the axes may be clipped away"
        assert not any(one.overlaps(two) for place, one in enumerate(names) for two in names[place + 1 :])


def test_long_stage_names_give_way_in_narrow_bands():
    name = "a stage of a long name"
    rows = [{"kind": "train", "step": s + 1, "stage": s, "stage_name": name, "entropy/mean": 0.5} for s in range(12)]
    names = [text.get_text() for text in drawn("entropy.png", rows).axes[0].texts]
    assert names == [f"stage {stage + 1}" for stage in range(12)]


def test_a_band_too_narrow_for_its_stage_s_name_says_its_context():
    names = [text.get_text() for text in drawn("entropy.png", run_rows(60)).axes[0].texts]
    assert names == ["grpo+ter\n4K", "dapo\n8K", "dapo\n16K"]
    rows = [row | {"stage_name": "a stage with a name as long as three"} for row in run_rows(60, evaluations=False)]
    names = [text.get_text() for text in drawn("entropy.png", rows).axes[0].texts]
    assert names == ["stage 1\n4K", "stage 2\n8K", "stage 3\n16K"]


def test_the_context_limit_does_not_flatten_the_curve():
    axes = drawn("length.png", run_rows(60)).axes[0]
    assert axes.get_ylim()[1] > 8192, "8K is near enough to 6K tokens to be seen"
    rows = [{"kind": "train", "step": step, "context": 32768, "length/mean": 300.0} for step in range(1, 9)]
    assert drawn("length.png", rows).axes[0].get_ylim()[1] < 400


@pytest.mark.parametrize(
    "rows",
    [
        run_rows(3),
        run_rows(60, evaluations=False, target=False),
        [{"kind": "train", "step": step} for step in range(1, 4)],
        [{"kind": "train", "step": 5, "entropy/mean": None, "length/mean": None, "reward/accuracy": 0.5}, evaluation(0, 0.5)],
    ],
    ids=["three-steps", "no-evaluation", "nothing-measured", "one-step-of-gaps"],
)
@pytest.mark.filterwarnings("error")
def test_every_figure_of_a_poor_run_is_drawn_without_a_warning(tmp_path, rows):
    written = plot(write(tmp_path, rows))
    assert [path.name for path in written] == list(FIGURES)
    assert all(path.stat().st_size > 5000 for path in written)


def test_two_drawings_are_the_same_bytes(tmp_path):
    write(tmp_path, run_rows(30))
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    for name in FIGURES:
        assert (tmp_path / "figures" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    empty, corrupt, unstarted = tmp_path / "empty", tmp_path / "corrupt", tmp_path / "unstarted"
    for folder in (empty, corrupt, unstarted):
        folder.mkdir()
    (corrupt / METRICS_FILE).write_text('{"kind": "train", "step": 1}\n{"kind"\n{"kind": "train", "step": 2}\n')
    write(unstarted, [evaluation(0, 0.5)])
    expected = {
        tmp_path / "none": "no such folder",
        empty: "no such file",
        corrupt: "line 2",
        unstarted: "no finished step",
    }
    for folder, words in expected.items():
        monkeypatch.setattr(sys, "argv", ["plot", str(folder)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        error = capsys.readouterr().err
        assert (ended.value.code, error.count("\n")) == (2, 1)
        assert error.startswith("keju: error: ")
        assert words in error


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        plot(write(tmp_path, run_rows(1)), tmp_path / "file")


def test_interruption_exits_as_a_shell_expects():
    def interrupted(_arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run(interrupted)
    assert ended.value.code == 130


def test_the_command_draws_a_run(tmp_path):
    write(tmp_path, run_rows(2))
    done = subprocess.run([sys.executable, "-m", "trainer.plot", str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "figures" / name) for name in FIGURES]
