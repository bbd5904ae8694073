"""The figures of a run, drawn from `RunData`. Each draw function fills a figure, or a part of one (the overview's cells).

Colours are Okabe and Ito's, told apart by colour-blind readers too. No pyplot: it keeps every figure in a global list. A picture
depends on the data alone (no date, no version in the file), so equal metrics give equal files.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from trainer.plot_data import PHASE_NAMES, Band, RunData, block_edges, block_means, shares, smooth, smoothing_window, stage_names

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C"
STAGE_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
EVALUATION_COLORS = (VERMILION, GREEN, PURPLE, ORANGE)
PHASE_COLORS = {
    "sample": BLUE,
    "reward": PURPLE,
    "score": SKY,
    "update": ORANGE,
    "sync": GREEN,
    "checkpoint": YELLOW,
    "evaluate": VERMILION,
    "other": "#C8C8C8",
}
FATE_COLORS = {
    "trained": BLUE,
    "recovered": GREEN,
    "uniform": "#C8C8C8",
    "expired": VERMILION,
    "aborted": ORANGE,
    "failed": "#000000",
    "pending": YELLOW,
}
STYLE = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a name may hold a dollar
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 32,  # room for the stages' names between title and axes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
}
DPI = 150
X_TICKS = 6
ALARM_COLORS = (VERMILION, PURPLE, ORANGE)
TIME_BARS = 120  # more bars than this are thinner than a pixel or two, and a short phase in them would vanish
CONTEXT_HEADROOM = 3.0  # a context limit more than this many times above the greatest mean length would flatten the curve


def draw_entropy(figure: FigureBase, data: RunData) -> None:
    """Mean token entropy over steps, with the target that regularisation holds it to (the paper's figure 3)."""
    axes = _step_axes(figure.subplots(), data, "Policy entropy", "mean token entropy (nats)")
    _curve(axes, data.steps, data.entropy, BLUE, "entropy")
    if np.isfinite(data.target).any():
        targets = np.unique(data.target[np.isfinite(data.target)])
        label = f"target {targets[0]:g}" if len(targets) == 1 else "target"
        _level(axes, data.steps, data.target, label, color="#222222", linestyle=(0, (5, 3)), linewidth=1.3, zorder=3)
    _least_span(axes, 0.05)
    _mark_alarms(axes, data, ("entropy", "language", "mismatch"))
    _legend_below(figure, axes)


def draw_length(figure: FigureBase, data: RunData) -> None:
    """Mean response length over steps, each stage in the colour of its name, under the context limit (figure 2)."""
    axes = _step_axes(figure.subplots(), data, "Response length", "mean response length (tokens)", stage_colors=True)
    window = smoothing_window(len(data.steps))
    for band in data.bands:
        part = slice(band.first, band.last + 1)
        # Smoothed stage by stage: a mean across the border would soften the jump that the new context makes.
        _curve(axes, data.steps[part], data.length[part], _stage_color(band), None, window)
    if not np.isfinite(data.length).any():
        _say_unmeasured(axes)
        return
    _mark_alarms(axes, data, ("length", "truncation", "repetition"))
    longest = np.nanmax(data.length)
    near = data.context[data.context <= CONTEXT_HEADROOM * longest]
    if len(near):
        # A limit too far above leaves through the top of the axes; the stage's name still says it.
        _level(axes, data.steps, data.context, "context limit (prompt and response)", color=GREY, linewidth=1.0)
    if axes.get_legend_handles_labels()[0]:
        _legend_below(figure, axes)
    axes.set_ylim(0, 1.08 * max(longest, near.max(initial=0.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def draw_accuracy(figure: FigureBase, data: RunData) -> None:
    """Evaluation and training accuracy over steps, and over raw prompts drawn: what the data bought (figure 4)."""
    over_steps, over_drawn = figure.subplots(1, 2, sharey=True)
    _step_axes(over_steps, data, "Accuracy over steps", "share right")
    _finish_axes(over_drawn, "Accuracy over data", "", "raw prompts drawn")
    if np.isfinite(data.drawn).any():
        known = np.concatenate([[0.0], np.nan_to_num(data.drawn)])
        _draw_bands(over_drawn, data.bands, np.maximum.accumulate(known), stage_colors=False)
    for axes, steps in ((over_steps, data.steps), (over_drawn, data.drawn)):
        _curve(axes, steps, data.accuracy, BLUE, "training samples")
    for place, series in enumerate(data.evaluations):
        color = EVALUATION_COLORS[place % len(EVALUATION_COLORS)]
        for axes, at in ((over_steps, series.steps), (over_drawn, series.drawn)):
            axes.plot(at, series.pass_at_1, "o-", color=color, markersize=4, linewidth=1.8, label=f"{series.name}, pass@1")
    over_steps.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _least_span(over_steps, 0.1)
    for axes in (over_steps, over_drawn):
        _widen(axes)
    _legend_below(figure, over_steps)
    if not np.isfinite(data.drawn).any():
        _say_unmeasured(over_drawn)


def draw_time(figure: FigureBase, data: RunData) -> None:
    """Where each step's seconds went, stacked by phase, with each phase's share of the whole run."""
    axes = _step_axes(figure.subplots(), data, "Time per step", "")
    if not data.seconds:
        _say_unmeasured(axes)
        return
    unit, divisor = _time_unit(float(np.median(sum(data.seconds.values()))))
    size = -(-len(data.steps) // TIME_BARS)
    axes.set_ylabel(f"{unit} per step" + (f", mean of {size} steps" if size > 1 else ""))
    part = shares(data.seconds)
    labels = {phase: f"{PHASE_NAMES[phase]}  {_percent(part[phase])}" for phase in data.seconds}
    bars = {phase: block_means(values, size) / divisor for phase, values in data.seconds.items()}
    _stack(axes, block_edges(_edges(data.steps), size), bars, PHASE_COLORS, labels)
    _legend_beside(axes, "share of the run")


def draw_ledger(figure: FigureBase, data: RunData) -> None:
    """What became of every prompt drawn so far; the parts add up to the prompts drawn."""
    axes = _step_axes(figure.subplots(), data, "Prompt ledger", "prompts drawn, cumulative")
    if not data.ledger:
        _say_unmeasured(axes)
        return
    counts = {fate: np.nan_to_num(values) for fate, values in data.ledger.items()}
    whole = max(1.0, sum(values[-1] for values in counts.values()))
    labels = {fate: f"{fate}  {values[-1]:,.0f} ({_percent(values[-1] / whole)})" for fate, values in counts.items()}
    _stack(axes, _edges(data.steps), counts, FATE_COLORS, labels)
    if np.isfinite(data.drawn).any():
        _level(axes, data.steps, data.drawn, f"drawn  {data.drawn[-1]:,.0f}", color="#222222", linewidth=1.2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _legend_beside(axes, "at the last step")


def draw_recipe(figure: FigureBase, data: RunData) -> None:
    """The overview: entropy, length, accuracy and time in one picture."""
    cells = figure.subfigures(2, 2, wspace=0.03, hspace=0.04)
    for cell, draw in zip(cells.flat, (draw_entropy, draw_length, draw_accuracy, draw_time), strict=True):
        draw(cell, data)


FIGURES: dict[str, tuple[Callable[[FigureBase, RunData], None], tuple[float, float]]] = {
    "entropy.png": (draw_entropy, (7.0, 4.0)),
    "length.png": (draw_length, (7.0, 4.0)),
    "accuracy.png": (draw_accuracy, (9.0, 4.0)),
    "time.png": (draw_time, (8.0, 4.0)),
    "ledger.png": (draw_ledger, (8.0, 4.0)),
    "recipe.png": (draw_recipe, (14.0, 8.0)),
}
"""File name → how it is drawn, and its width and height in inches."""


def save_figures(data: RunData, folder: Path) -> list[Path]:
    """Draw every figure into `folder`, which exists; returns the files written."""
    written = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        for name, (draw, size) in FIGURES.items():
            figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08), facecolor="white")
            FigureCanvasAgg(figure)
            draw(figure, data)
            figure.savefig(folder / name, metadata={"Software": None})
            written.append(folder / name)
    return written


class _BandName(Text):
    """A stage's name above its band: the first of `names` that fits the band as it is drawn, or nothing where none does."""

    def __init__(self, axes: Axes, left: float, right: float, names: tuple[str, ...], color: str):
        at = axes.get_xaxis_transform()
        super().__init__((left + right) / 2, 1.02, names[0], transform=at, color=color, size=8.5, ha="center", va="bottom")
        self._band, self._names = (left, right), names
        self.set_clip_on(False)
        self.set_in_layout(False)  # the title's pad keeps its place; a long name must not widen the figure

    def draw(self, renderer) -> None:
        (left, _), (right, _) = self.axes.transData.transform([(edge, 0.0) for edge in self._band])
        for name in (*self._names, ""):
            self.set_text(name)
            if not name or self.get_window_extent(renderer).width <= right - left:
                break
        super().draw(renderer)


def _step_axes(axes: Axes, data: RunData, title: str, y_label: str, *, stage_colors: bool = False) -> Axes:
    _finish_axes(axes, title, y_label, "training step")
    _draw_bands(axes, data.bands, _edges(data.steps), stage_colors=stage_colors)
    return axes


def _finish_axes(axes: Axes, title: str, y_label: str, x_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(X_TICKS, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylabel(y_label)


def _mark_alarms(axes: Axes, data: RunData, names: tuple[str, ...]) -> None:
    """A bar at the foot of the axes over the steps in which each of these alarms lasted, with its name."""
    for place, name in enumerate(name for name in names if name in data.alarms):
        lasted, edges = data.alarms[name] > 0, _edges(data.steps)
        starts = np.flatnonzero(lasted & ~np.append(False, lasted[:-1]))
        for start in starts:
            end = start + int(np.argmin(np.append(lasted[start:], False)))
            foot = {"ymin": 0.05 * place, "ymax": 0.05 * place + 0.04, "linewidth": 0, "color": ALARM_COLORS[place], "zorder": 1}
            axes.axvspan(edges[start], edges[end], label=f"alarm: {name}" if start == starts[0] else None, **foot)


def _draw_bands(axes: Axes, bands: tuple[Band, ...], edges: np.ndarray, *, stage_colors: bool) -> None:
    """Light grounds for every second stage and the stages' names on top. edges [n + 1]: where the steps begin and end."""
    for place, band in enumerate(bands):
        left, right = edges[band.first], edges[band.last + 1]
        if place % 2:
            axes.axvspan(left, right, color="#F2F2F2", linewidth=0, zorder=0)
        axes.add_artist(_BandName(axes, left, right, _band_names(band), _stage_color(band) if stage_colors else "#555555"))
    axes.set_xlim(edges[0], max(edges[-1], edges[0] + 1))


def _band_names(band: Band) -> tuple[str, ...]:
    """Longest first. The context stands in a line of its own, so that a band too narrow for the stage's name still says it."""
    number, (whole, *rest) = f"{band.stage + 1}", stage_names(band) or ("",)
    if not rest:
        return (*filter(None, [whole]), f"stage {number}", number)
    (name,) = rest
    context = whole.removeprefix(f"{name}, ")
    return (f"{name}\n{context}", f"stage {number}\n{context}", f"{number}\n{context}", f"stage {number}", number)


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str | None, window: int | None = None) -> None:
    """A smoothed line over faint raw points; in a short run the raw values themselves, joined."""
    window = smoothing_window(len(x)) if window is None else window
    if not np.isfinite(y).any():
        return
    if window == 1:
        axes.plot(x, y, "o-", color=color, markersize=3.5, linewidth=1.5, label=label)
        return
    axes.plot(x, y, "o", color=color, markersize=3, alpha=0.35, markeredgewidth=0)
    axes.plot(x, smooth(y, window), color=color, linewidth=2.0, label=label and f"{label}, mean of {window} steps")


def _stack(axes: Axes, edges: np.ndarray, parts: dict[str, np.ndarray], colors: dict[str, str], labels: dict[str, str]) -> None:
    base = np.zeros(len(edges) - 1)
    for name, values in parts.items():
        axes.stairs(base + values, edges, baseline=base, fill=True, color=colors[name], label=labels[name], linewidth=0)
        base = base + values
    axes.set_ylim(0, max(base.max() * 1.05, 1e-9))


def _level(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, **line) -> None:
    axes.stairs(values, _edges(steps), baseline=None, label=label, **line)


def _edges(steps: np.ndarray) -> np.ndarray:
    """[n + 1] where the steps begin and end, each step half a step to both sides."""
    return np.append(steps - 0.5, steps[-1] + 0.5)


def _widen(axes: Axes) -> None:
    """Room at both sides for markers at the first and the last place, an evaluation before training among them."""
    left, right = axes.dataLim.intervalx
    if not np.isfinite([left, right]).all():
        return
    margin = max(0.02 * (right - left), 0.5)
    axes.set_xlim(left - margin, right + margin)


def _least_span(axes: Axes, span: float) -> None:
    """Keep the y axis from magnifying a constant's noise to the height of the figure."""
    low, high = axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)


def _legend_below(figure: FigureBase, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(handles)))
    else:
        _say_unmeasured(axes)


def _legend_beside(axes: Axes, title: str) -> None:
    """To the right, in the order of the stack from the top."""
    handles, labels = axes.get_legend_handles_labels()
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0}
    axes.legend(handles[::-1], labels[::-1], title=title, alignment="left", title_fontsize=8.5, **place)


def _say_unmeasured(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured in this run", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _stage_color(band: Band) -> str:
    return STAGE_COLORS[band.stage % len(STAGE_COLORS)]


def _time_unit(seconds: float) -> tuple[str, float]:
    return ("seconds", 1.0) if seconds < 180 else ("minutes", 60.0)


def _percent(part: float) -> str:
    return "< 1%" if 0 < part < 0.01 else f"{part:.0%}"
