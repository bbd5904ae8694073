"""The picture of a run's JSON: time a token over T, a panel an operation, every contender a labelled line, the floor dashed. An
operation that was measured at one T alone has bars, for one point is no line.

Time a token, because time itself grows with T for all alike and would hide that lines lie a factor of two apart. Colours are
Okabe and Ito's, and markers differ too, so that lines are told apart without colour. Of the shapes of an operation the one
measured at most values of T is drawn.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.kernels.cases import BOTH, FORWARD

PANELS = (
    ("logprob_entropy", FORWARD),
    ("logprob_entropy", BOTH),
    ("policy_loss_from_logits", BOTH),
    ("linear_logprob_entropy", FORWARD),
    ("linear_logprob_entropy", BOTH),
    ("linear_policy_loss", BOTH),
    ("clipped_policy_loss", BOTH),
)
FLOOR, GREY = "floor", "#8C8C8C"
LOOKS = {
    "keju": ("#0072B2", "o"),
    "keju, fp32 d_weight": ("#56B4E9", "o"),
    "torch eager": ("#444444", "s"),
    "torch.compile": ("#8C8C8C", "s"),
    "F.linear_cross_entropy": ("#B0A030", "s"),
    "TRL": ("#D55E00", "^"),
    "Liger": ("#009E73", "D"),
    "verl": ("#CC79A7", "v"),
    "cut-cross-entropy": ("#E69F00", "P"),
    "quack": ("#7A3E9D", "X"),
    FLOOR: ("#000000", ""),
}
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8C8C8C",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
SHORT = {
    "TRL selective_log_softmax_and_entropy": "TRL",
    "TRL ChunkedLogProbFunction": "TRL chunked",
    "Liger triton_grpo_loss": "Liger grpo",
    "Liger FusedLinearGRPOLoss": "Liger GRPO",
    "Liger FusedLinearScaledCrossEntropy": "Liger CuTe",
    "Liger FusedLinearScaledCrossEntropy, without CuTe": "Liger head",
    "verl linear_cross_entropy": "verl",
    "cut-cross-entropy": "CCE (logprob only)",
    "cut-cross-entropy, unfiltered": "CCE unfiltered",
    "quack chunked_linear_cross_entropy": "quack (loss only)",
    "F.linear_cross_entropy": "F.linear_c.e. (loss only)",
    "keju, fp32 d_weight": "keju, fp32 dW",
}


@dataclass(frozen=True)
class Panel:
    """lines: microseconds a token by T of each contender, the floor among them."""

    title: str
    subtitle: str
    lines: Mapping[str, Mapping[int, float]]


def panels(record: Mapping) -> list[Panel]:
    """The panels for which the run has something."""
    found = []
    for operation, mode in PANELS:
        cases = [
            case
            for case in record["cases"]
            if (case["case"]["operation"], case["case"]["mode"]) == (operation, mode) and not case["skipped"]
        ]
        if not cases:
            continue
        shape = Counter(_shape(case) for case in cases).most_common(1)[0][0]
        lines: dict[str, dict[int, float]] = {}
        for case in (case for case in cases if _shape(case) == shape):
            tokens = case["case"]["tokens"]
            for one in case["measurements"]:
                if one["milliseconds"]:
                    lines.setdefault(one["contender"], {})[tokens] = 1000 * one["milliseconds"]["median"] / tokens
            if case["floor_ms"]:
                lines.setdefault(FLOOR, {})[tokens] = 1000 * case["floor_ms"] / tokens
        vocabulary, hidden, dtype = shape
        sizes = [f"V = {vocabulary:,}" if vocabulary else "", f"D = {hidden:,}" if hidden else "", dtype]
        # "keju, fp32 d_weight" stays; the other backends' lines would hide the peers'.
        lines = {name: line for name, line in lines.items() if not name.startswith("keju, ") or "d_weight" in name}
        found.append(Panel(f"{operation}, {mode}", ", ".join(part for part in sizes if part), lines))
    return found


def draw(file: Path) -> Path:
    """Draws FILE.json as FILE.png and returns the picture's path. Raises ValueError where the run has nothing to draw."""
    record = json.loads(file.read_text(encoding="utf-8"))
    found = panels(record)
    if not found:
        raise ValueError(f"{file}: no measured case to draw")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * columns, 3.9 * rows + 0.7), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        machine = record["machine"]
        title = f"Time a token on {machine['device']}: median time of a call over its T tokens; lower is better"
        figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax, panel in zip(axes, found, strict=False):
            draw_panel(ax, panel)
        for ax in axes[len(found) :]:
            ax.set_axis_off()
        note = f"{machine['date'][:10]}, commit {machine['commit']}, torch {machine['torch']}, triton {machine['triton']}"
        figure.supxlabel(note, fontsize=8, color="#666666", x=0.01, ha="left")
        path = file.with_suffix(".png")
        figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def draw_panel(ax: Axes, panel: Panel) -> None:
    ax.set_title(f"{panel.title}\n", pad=2)
    tokens = sorted({count for line in panel.lines.values() for count in line})
    subtitle = f"T = {_thousands(tokens[0])}, {panel.subtitle}" if len(tokens) == 1 else panel.subtitle
    ax.text(0, 1.015, subtitle, transform=ax.transAxes, fontsize=8, color="#666666")
    if len(tokens) == 1:
        _draw_bars(ax, {name: line[tokens[0]] for name, line in panel.lines.items()})
    else:
        _draw_lines(ax, panel, tokens)


def _draw_bars(ax: Axes, times: Mapping[str, float]) -> None:
    """times: microseconds a token by contender. The fastest on top, the floor among them hollow, with a line through all."""
    names = sorted(times, key=times.__getitem__)
    ax.grid(axis="y", visible=False)
    for row, name in enumerate(names):
        color, _ = look(name)
        hollow = {"color": "white", "edgecolor": color, "linestyle": (0, (4, 2))} if name == FLOOR else {"color": color}
        ax.barh(row, times[name], 0.62, **hollow)
        ax.annotate(
            _three_digits(times[name]), (times[name], row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8,
            color="#444444", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    if FLOOR in times:
        ax.axvline(times[FLOOR], color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), zorder=0.9)
    ax.set_yticks(range(len(names)), [SHORT.get(name, name) for name in names], fontsize=8)
    for label, name in zip(ax.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == "keju" else "normal")
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.16 * max(times.values()))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _three_digits(value)))
    ax.set_xlabel("µs a token")


def _draw_lines(ax: Axes, panel: Panel, tokens: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for name, line in panel.lines.items():
        color, marker = look(name)
        points = sorted(line.items())
        thick = name == "keju"
        ax.plot(
            *zip(*points, strict=True), color=color, marker=marker, markersize=5 if thick else 4, linewidth=2.6 if thick else 1.3,
            markerfacecolor="white" if "," in name else color,
            linestyle=(0, (4, 2)) if name == FLOOR else "-", zorder=5 if thick else 3 if name != FLOOR else 4,
        )  # fmt: skip
    ax.xaxis.set_major_locator(FixedLocator(tokens))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _thousands(int(value))))
    ax.xaxis.set_minor_locator(NullLocator())
    heights = [height for line in panel.lines.values() for height in line.values()]
    spare = max(1.4, math.sqrt(8 * min(heights) / max(heights)))  # lines that lie close together are not blown up
    low, high = min(heights) / spare, max(heights) * spare
    ax.set_ylim(low, high)
    digits = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=digits))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("T, tokens")
    ax.set_ylabel("µs a token")
    ax.set_xlim(tokens[0] / 1.25, tokens[-1] * 1.25)
    _label(ax, panel.lines)


def _label(ax: Axes, lines: Mapping[str, Mapping[int, float]]) -> None:
    """Each line's name right of the axes at the height of its last point, moved apart where they would overlap."""
    low, high = (math.log10(limit) for limit in ax.get_ylim())
    ends = {name: (math.log10(line[max(line)]) - low) / (high - low) for name, line in lines.items()}
    names = sorted(ends, key=lambda name: ends[name])
    for name, height in zip(names, spread_out([ends[name] for name in names], 0.066), strict=True):
        color, _ = look(name)
        line = lines[name]
        ax.annotate(
            SHORT.get(name, name), xy=(max(line), line[max(line)]), xycoords="data", xytext=(1.03, height),
            textcoords="axes fraction", va="center", fontsize=8, color=color, fontweight="bold" if name == "keju" else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Sorted heights in [0, 1] moved apart to at least `gap`, groups around their middle, as long as all fit between 0 and 1."""
    groups: list[tuple[float, int]] = []  # (middle, how many)
    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1 and _low(groups[-1], gap) < _low(groups[-2], gap) + gap * groups[-2][1]:
            (upper, above), (lower, below) = groups.pop(), groups.pop()
            groups.append(((below * lower + above * upper) / (below + above), below + above))
    return [_low(group, gap) + gap * place for group in groups for place in range(group[1])]


def _low(group: tuple[float, int], gap: float) -> float:
    """Where a group's lowest label stands, moved inside."""
    middle, count = group
    half = gap * (count - 1) / 2
    return max(0.0, min(middle - half, 1.0 - 2 * half))


def look(name: str) -> tuple[str, str]:
    """Colour and marker: by the whole name, else by the project it begins with."""
    if name in LOOKS:
        return LOOKS[name]
    return next((LOOKS[known] for known in LOOKS if name.startswith(known)), ("#666666", "."))


def _shape(case: Mapping) -> tuple[int, int, str]:
    return case["case"]["vocabulary"], case["case"]["hidden"], case["case"]["dtype"]


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _thousands(count: int) -> str:
    return f"{count // 1024}K" if count >= 1024 and count % 1024 == 0 else str(count)
