"""The picture of a record: on the left the seconds of a step by phase, each way above what the planner said of it, on the right
the memory of its update, measured above planned. A bar is as long as the medians of its phases together; its label tells the
median of the whole step, which differs a little. Colours are Okabe and Ito's; planned bars are hatched too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.kernels.plot import STYLE
from benchmarks.train_step.phases import BACKWARD, CLIP, FORWARD, HEAD, OPTIMIZER, OTHER, PHASES

COLORS = {
    FORWARD: "#56B4E9",
    HEAD: "#D55E00",
    BACKWARD: "#0072B2",
    CLIP: "#F0E442",
    OPTIMIZER: "#009E73",
    OTHER: "#BBBBBB",
}
SCORE_COLOR, PLANNED_COLOR, MEMORY_COLOR = "#E69F00", "#DDDDDD", "#0072B2"
HEIGHT = 0.34


def bars(way: Mapping[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Seconds in the order in which they are drawn: "measured" is the score as a whole and the update's phases, in shares of the
    median of rounds without marks; "planned" is the score and the update."""
    phases = way["phases"]["update"]
    update, whole = way["seconds"]["update"]["median"], sum(phases.values())
    return {
        "measured": [
            ("score", way["seconds"]["score"]["median"]),
            *((phase, phases[phase] / whole * update) for phase in PHASES),
        ],
        "planned": list(way["planned_seconds"].items()),
    }


def draw(file: Path) -> Path:
    """Draws FILE.json as FILE.png and returns the picture's path."""
    record = json.loads(file.read_text(encoding="utf-8"))
    ways, setting, machine = record["ways"], record["setting"], record["machine"]
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(13, 1.9 + 0.85 * len(ways)), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        title = (
            f"A step of {setting['architecture']}: {setting['sequences']} sequences of {setting['context']:,} tokens in "
            f"{setting['dtype']} on {setting['ranks']} × {machine['device']}"
        )
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        left, right = figure.subplots(1, 2, width_ratios=(2.1, 1), sharey=True)
        _seconds(left, ways)
        _memory(right, ways)
        left.set_yticks(range(len(ways)), ways)
        left.set_ylim(len(ways) - 0.4, -0.6)
        load = machine["load"]
        note = (
            f"{machine['date'][:10]}, commit {machine['commit']}, torch {machine['torch']}; load {load['before']:.1f} before, "
            f"{load['after']:.1f} after; medians of {setting['rounds']} rounds in turn, labels of steps, bars of phases"
        )
        figure.supxlabel(note, fontsize=8, color="#666666", x=0.01, ha="left")
        path = file.with_suffix(".png")
        figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _seconds(ax: Axes, ways: Mapping[str, Any]) -> None:
    ax.set_title("Seconds by phase; hatched: planned at the measured GEMM rate")
    seen: dict[str, Any] = {}
    for row, way in enumerate(ways.values()):
        start = 0.0
        for phase, seconds in bars(way)["measured"]:
            color = SCORE_COLOR if phase == "score" else COLORS[phase]
            seen[phase] = ax.barh(row - HEIGHT / 2, seconds, HEIGHT, start, color=color, edgecolor="white", linewidth=0.6)
            start += seconds
        step = way["seconds"]["step"]["median"]
        ax.annotate(
            f"{step:.2f} s, MFU {way['mfu']:.0%}, HFU {way['hfu']:.0%}", (start, row - HEIGHT / 2), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
        start = 0.0
        for phase, seconds in bars(way)["planned"]:
            seen[f"{phase}, planned"] = ax.barh(
                row + HEIGHT / 2, seconds, HEIGHT, start, color="#FBE6C0" if phase == "score" else PLANNED_COLOR, hatch="////",
                edgecolor="white", linewidth=0.6,
            )  # fmt: skip
            start += seconds
        ax.annotate(
            f"{start:.1f} s; measured is {step / start:.2f} of it", (start, row + HEIGHT / 2), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color="#666666",
        )  # fmt: skip
    ax.set_xlim(0, 1.3 * ax.dataLim.x1)
    ax.set_xlabel("seconds")
    order = [name for name in ("score", *PHASES, "score, planned", "update, planned") if name in seen]
    ax.legend(
        [seen[name] for name in order], order, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=5, frameon=False, fontsize=8
    )


def _memory(ax: Axes, ways: Mapping[str, Any]) -> None:
    ax.set_title("Memory of the update, GB; hatched: planned")
    for row, way in enumerate(ways.values()):
        for place, key, color in ((-1, "measured", MEMORY_COLOR), (1, "planned", PLANNED_COLOR)):
            count = way["memory"][key]
            at = row + place * HEIGHT / 2
            if count is not None:
                ax.barh(
                    at, count / 1e9, HEIGHT, color=color, edgecolor="white", linewidth=0.6, hatch="////" if place > 0 else None
                )
            text = "not measured" if count is None and place < 0 else "not planned" if count is None else f"{count / 1e9:.2f}"
            if place > 0 and way["memory"]["ratio"]:
                text += f", {way['memory']['ratio']:.0%} of measured"
            ax.annotate(
                text, ((count or 0) / 1e9, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                color="#666666" if place > 0 else "black",
            )  # fmt: skip
    ax.set_xlim(0, 1.6 * max(ax.dataLim.x1, 1e-9))
    ax.set_xlabel("GB")
