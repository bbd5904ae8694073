"""The picture of a serving run's JSON: tokens per second and latencies over the request rate, the paper's figure 5.

Filled markers: the server held the rate. Hollow ones: it did not, or was still filling when the last request came, so that
latencies say how long was sent, and nothing else. Times are on a logarithmic scale. Colours are Okabe and Ito's, and markers
differ too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from trainer.plot_draw import BLUE, DPI, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILION

LOOKS = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "D"), (PURPLE, "^"), (ORANGE, "v"))
LATENCIES = (
    ("ttft_ms", "Time to first token", "seconds", 1000.0),
    ("tpot_ms", "Time per output token", "milliseconds", 1.0),
    ("latency_ms", "Latency of a request", "seconds", 1000.0),
)


def draw(file: Path) -> Path:
    """Draws FILE.json as FILE.png and returns the picture's path."""
    record = json.loads(file.read_text(encoding="utf-8"))
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "axes.titlepad": 8}):
        figure = Figure(figsize=(10.5, 7.2), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1, rect=(0, 0, 1, 0.925))
        panels = figure.subplots(2, 2).flatten()
        _throughput(panels[0], record)
        for axes, (key, title, unit, divisor) in zip(panels[1:], LATENCIES, strict=True):
            _latency(axes, record["servers"], key, title, unit, divisor)
        settings, machine = record["settings"], record["machine"]
        lengths = f"{settings['input_tokens']:,} prompt and {settings['output_tokens']:,} output tokens"
        title = f"Serving at rising request rates: {lengths}"
        figure.text(0.012, 0.985, title, fontsize=12, fontweight="bold", va="top")
        note = f"{_place(record)}; vLLM {machine['vllm']}; {machine['date']}, commit {machine['commit']}"
        figure.text(0.012, 0.952, note, fontsize=8.5, color="#666666", va="top")
        handles = _legend(record)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) < 7 else 4)
        path = file.with_suffix(".png")
        figure.savefig(path, metadata={"Software": None})
    return path


def _place(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    if url := record["servers"][0]["url"]:
        return f"server at {url}"
    if machine["device"] != "cpu":
        return machine["device"]
    threads = record["settings"]["threads"]
    emulated = "; FP8 is emulated there" if "TorchFP8" in str([server["kernels"] for server in record["servers"]]) else ""
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''} of it for the server{emulated}"


def _throughput(axes: Axes, record: Mapping[str, Any]) -> None:
    _finish(axes, "Throughput", "output tokens per second")
    rates = sorted({row["rate"] for server in record["servers"] for row in server["rates"]})
    most = max(row["output_tokens_per_second"] for server in record["servers"] for row in server["rates"])
    offered = [rate * record["settings"]["output_tokens"] for rate in rates]
    axes.plot([0, *rates], [0, *offered], color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    for server, look in zip(record["servers"], _looks(record["servers"]), strict=True):
        _line(axes, server["rates"], lambda row: row["output_tokens_per_second"], look)
    axes.set_xlim(0, 1.05 * rates[-1])
    axes.set_ylim(0, 1.25 * most)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _latency(axes: Axes, servers: Sequence[Mapping[str, Any]], key: str, title: str, unit: str, divisor: float) -> None:
    _finish(axes, title, unit)
    for server, look in zip(servers, _looks(servers), strict=True):
        _line(axes, server["rates"], lambda row: row[key]["median"] / divisor, look)
        _line(axes, server["rates"], lambda row: row[key]["p99"] / divisor, look, worst=True)
    axes.set_xlim(0, 1.05 * max(row["rate"] for server in servers for row in server["rates"]))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _line(
    axes: Axes,
    rows: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping], float],
    look: tuple[str, str],
    *,
    worst: bool = False,
) -> None:
    color, marker = look
    rates, values = [row["rate"] for row in rows], [value(row) for row in rows]
    axes.plot(rates, values, color=color, linewidth=1.0 if worst else 1.8, linestyle=":" if worst else "-")
    for held in (True, False):
        places = [at for at, row in enumerate(rows) if bool(row["held"]) is held]
        face = color if held else "white"
        axes.plot(
            [rates[at] for at in places], [values[at] for at in places], marker, color=color, markerfacecolor=face,
            markersize=4 if worst else 6,
        )  # fmt: skip


def _finish(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("requests per second")
    axes.set_ylabel(unit)


def _looks(servers: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [LOOKS[place % len(LOOKS)] for place in range(len(servers))]


def names(record: Mapping[str, Any]) -> list[str]:
    """What the legend calls the servers: how each computes, where that tells them apart, else its model folder."""
    servers = record["servers"]
    precisions = [
        record["settings"]["dtype"] if server["quantization"] is None
        else "FP8 (emulated)" if "TorchFP8" in str(server["kernels"]) and record["machine"]["device"] == "cpu"
        else str(server["quantization"])
        for server in servers
    ]  # fmt: skip
    if len(set(precisions)) == len(servers) and not any(server["url"] for server in servers):
        return precisions
    return [Path(server["model"]).name for server in servers]


def _legend(record: Mapping[str, Any]) -> list[Line2D]:
    lines = [
        Line2D([], [], color=color, marker=marker, linewidth=1.8, label=name)
        for name, (color, marker) in zip(names(record), _looks(record["servers"]), strict=True)
    ]
    return [
        *lines,
        Line2D([], [], color="#444444", linestyle=":", label="99th percentile (solid: median)"),
        Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="", label="not held, or unsettled"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 3)), label="tokens asked for"),
    ]
