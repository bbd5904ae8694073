"""Panels that the experiments share: curves with 95 % bands over seeds, bars with whiskers, heat maps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.recipe.experiment import Experiment
from benchmarks.recipe.records import Mean, Record, band, smoothed
from trainer.plot_draw import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, VERMILION

COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
"""Of the same places: lines that lie on each other show through."""
WIDTH = 0.8
"""Of a group of bars."""


def draw(experiment: Experiment, file: Path) -> Path:
    """Draws FILE.json as FILE.png and returns the picture's path."""
    record = json.loads(file.read_text(encoding="utf-8"))
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "axes.titlepad": 8}):
        figure = Figure(figsize=experiment.figure, dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, rect=(0, 0, 1, 1 - 0.48 / experiment.figure[1]))
        experiment.draw(figure, record["runs"])
        machine, top = record["machine"], experiment.figure[1]
        figure.text(0.012, 1 - 0.09 / top, record["question"], fontsize=12, fontweight="bold", va="top")
        when = f"{machine['date']}, commit {machine['commit']}"
        note = f"{record['scale']}; {experiment.shown}; {when}"
        figure.text(0.012, 1 - 0.31 / top, note, fontsize=8.5, color="#666666", va="top")
        path = file.with_suffix(".png")
        figure.savefig(path, metadata={"Software": None})
    return path


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def curves(
    axes: Axes, arms: Mapping[str, Sequence[Record]], column: str, *, width: int = 1, color: Mapping[str, str] | None = None
) -> None:
    """A column of the train rows over steps; width: of the smoothing."""
    for place, (name, records) in enumerate(arms.items()):
        shade = (color or {}).get(name, COLORS[place % len(COLORS)])
        smooth = [{"train": {column: smoothed(record["train"][column], width)}} for record in records]
        mean, half = band(smooth, column)
        steps = np.arange(1, len(mean) + 1)
        axes.fill_between(steps, mean - half, mean + half, color=shade, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=shade, label=name, linewidth=1.8, linestyle=DASHES[place % len(DASHES)])


def evaluations(axes: Axes, arms: Mapping[str, Sequence[Record]], bucket: str = "all") -> None:
    """pass@1 on held-out problems over steps."""
    for place, (name, records) in enumerate(arms.items()):
        shade = COLORS[place % len(COLORS)]
        mean, half = band(records, bucket, "eval")
        axes.errorbar(
            records[0]["eval"]["step"], mean, half, color=shade, label=name, linewidth=1.8, marker="o", markersize=4, capsize=2,
            elinewidth=0.8,
        )  # fmt: skip


def over(axes: Axes, arms: Mapping[str, Sequence[Record]], x: str, y: str = "accuracy", points: int = 60) -> None:
    """Smoothed column `y` over column `x`, each seed's curve read at the same places of x, as far as all of an arm's go."""
    for place, (name, records) in enumerate(arms.items()):
        shade = COLORS[place % len(COLORS)]
        least = max(record["train"][x][0] for record in records)
        most = min(record["train"][x][-1] for record in records)
        at = np.linspace(least, most, points)
        table = [np.interp(at, record["train"][x], smoothed(record["train"][y])) for record in records]
        mean, half = band([{"train": {y: row}} for row in table], y)
        axes.fill_between(at, mean - half, mean + half, color=shade, alpha=0.18, linewidth=0)
        axes.plot(at, mean, color=shade, label=name, linewidth=1.8, linestyle=DASHES[place % len(DASHES)])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)


def bars(axes: Axes, groups: Sequence[str], arms: Mapping[str, Sequence[Mean]]) -> None:
    """arms: name → a mean for each group."""
    for place, (name, means) in enumerate(arms.items()):
        at = np.arange(len(groups)) + (place - (len(arms) - 1) / 2) * WIDTH / len(arms)
        half = [mean.half if math.isfinite(mean.half) else 0.0 for mean in means]
        axes.bar(
            at, [mean.mean for mean in means], WIDTH / len(arms) * 0.92, yerr=half, color=COLORS[place % len(COLORS)], label=name,
            error_kw={"elinewidth": 0.9, "capsize": 2, "ecolor": "#444444"},
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    if all(mean.mean >= 0 for means in arms.values() for mean in means):
        axes.set_ylim(bottom=0)  # an interval of a share may reach below, the share itself cannot


def heat(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], values: np.ndarray, form: str = ".2f",
    texts: Sequence[Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """values: [rows, columns]; each cell carries its number, or what `texts` has for it."""
    axes.grid(visible=False)
    picture = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        ink = "black" if value > middle else "white"
        text = f"{value:{form}}" if texts is None else texts[row][column]
        axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
    axes.figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.03)


def level(axes: Axes, value: float, label: str, spread: float = 0.0) -> None:
    """A horizontal line, with a band of ± spread."""
    axes.axhline(value, color="#222222", linewidth=1.2, linestyle=(0, (5, 3)), label=label, zorder=3)
    if spread:
        axes.axhspan(value - spread, value + spread, color=GREY, alpha=0.15, linewidth=0)
