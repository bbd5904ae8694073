"""The picture of a long run's JSON (`benchmarks.soak.memory`): memory of each process over the steps, and what it has open."""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.soak.memory import SETTLED
from trainer.plot_draw import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILION

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, GREY)


def draw(file: Path) -> Path:
    """Draws FILE.json as FILE.png and returns the picture's path."""
    record = json.loads(file.read_text(encoding="utf-8"))
    whole = len(record["processes"])
    names = [name for name, values in record["mib"].items() if len(values) == whole]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "axes.titlepad": 8}):
        figure = Figure(figsize=(10, 8), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        memory, counts, work = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1.3))
        steps = range(1, whole + 1)
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            growth = record["growth"].get(name)
            label = name if growth is None else f"{name} ({growth:+.1%})"
            memory.plot(steps, record["mib"][name], color=colour, linewidth=1.2, label=label)
            low = record["held"].get(name, record["least"][name])
            memory.plot(steps, [math.nan if value is None else value for value in low], color=colour, linestyle=":")
        memory.axvline(SETTLED, color=GREY, linewidth=0.8, linestyle=":")
        memory.set_ylim(bottom=0)
        memory.set_ylabel("MiB (resident)")
        memory.set_title(
            f"Memory of each process: median of each step and, dotted, what growth after step {SETTLED} is taken from:\n"
            "what a rank holds at its checkpoints, another process's least",
            loc="left",
        )
        figure.legend(*memory.get_legend_handles_labels(), ncols=len(names), loc="outside upper center")
        for what, colour in (("threads", BLUE), ("files", VERMILION)):
            total = [sum(record[what][name][step] for name in names) for step in range(whole)]
            counts.plot(steps, total, color=colour, linewidth=1.2, label=what)
        counts.plot(steps, record["processes"], color=GREEN, linewidth=1.2, label="processes")
        counts.plot(steps, record["shared"], color=PURPLE, linewidth=1.2, label="files in shared memory")
        counts.set_ylim(bottom=0)
        work.plot(steps, record["work"]["length/max"], color=ORANGE, linewidth=1.0)
        work.set_ylim(bottom=0)
        work.set_ylabel("tokens")
        work.set_title("The longest output of each step", loc="left")
        work.set_xlabel("step")
        counts.set_title("Open, all processes together", loc="left")
        counts.legend(ncols=4, loc="center right", bbox_to_anchor=(1, 0.72))
        machine = record["machine"]
        figure.supxlabel(
            f"{record['engine']} engine; {machine['cpu']}; {machine['date']}, commit {machine['commit']}", fontsize=8
        )
        path = file.with_suffix(".png")
        figure.savefig(path, metadata={"Software": None})
    return path
