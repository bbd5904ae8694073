"""The report as one HTML page that needs nothing else: a Sankey picture as inline SVG, tables, examples. No script, no
network."""

from __future__ import annotations

from html import escape
from typing import Any

_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#edc948", "#76b7b2", "#9c755f", "#e15759", "#bab0ac", "#86bcb6")
_GONE = "#c8553d"
_WIDTH, _TOP, _HEIGHT, _NODE = 1180, 34, 250, 12
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--dim:#777} body{font:15px/1.5 system-ui,sans-serif;max-width:1240px;margin:2rem
auto;padding:0 1rem} table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid
var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{width:100%;height:auto}svg
text{fill:currentColor;font-size:12px} details{margin:.4rem 0}summary{cursor:pointer}.q{white-space:pre-wrap;margin:.2rem
0}.dim{color:var(--dim)} .pair{border-left:3px solid var(--line);padding-left:.8rem;margin:.8rem 0}
"""


def page(data: dict[str, Any]) -> str:
    """The whole page for a JSON report (`curation.report`)."""
    kept, read = data["rows_kept"], data["rows_read"]
    head = f"<p>{read:,} rows read, <b>{kept:,}</b> kept ({_percent(kept, read)}), {data['for_judge']:,} of them for a judge.</p>"
    parts = [head, sankey(data), _steps(data), _sources(data), *(_examples(step) for step in data["steps"])]
    parts.append(f"<details><summary>Options</summary><pre>{escape(_lines(data['options']))}</pre></details>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Curation report</title><style>{_STYLE}</style></head><body><h1>Curation report</h1>{''.join(parts)}"
        "</body></html>\n"
    )


def sankey(data: dict[str, Any]) -> str:
    """Sources on the left, one band through the steps, what each step removed falling out below, the kept sources on the
    right."""
    total = max(1, data["rows_read"])
    scale = _HEIGHT / total
    sources = list(data["sources"].items())
    stages = [("quarantine", data["rows_quarantined"], data["rows_read"])]
    stages += [(step["title"], step["removed"], step["in"]) for step in data["steps"]]
    gap = (_WIDTH - 320) / (len(stages) + 1)
    xs = [150 + gap * (index + 1) for index in range(len(stages))]
    drawn = [_entries(sources, "read", 0, 150, xs[0] - 150, scale, left=True)]
    for index, (title, removed, entered) in enumerate(stages):
        after = entered - removed
        end = xs[index + 1] if index + 1 < len(stages) else _WIDTH - 170
        drawn.append(_node(xs[index], _TOP, entered * scale, "#888", f"{entered:,} rows before: {title}"))
        drawn.append(_ribbon(xs[index] + _NODE, _TOP, end, _TOP, after * scale, "#7f8fa6", f"{after:,} rows after: {title}"))
        if removed:
            drawn.append(_fall(xs[index] + _NODE, _TOP + after * scale, removed * scale, f"{title}: {removed:,} removed"))
        level = _TOP + _HEIGHT + 66 + 34 * (index % 2)
        drawn.append(f'<text x="{xs[index] + _NODE + 8:.1f}" y="{level}" text-anchor="middle">{escape(title)}</text>')
        drawn.append(
            f'<text x="{xs[index] + _NODE + 8:.1f}" y="{level + 15}" text-anchor="middle" font-weight="600">−{removed:,}</text>'
        )
    drawn.append(_entries(sources, "kept", _WIDTH - 170, _WIDTH - 158, 0, scale, left=False))
    drawn.append(
        f'<text x="{_WIDTH - 164}" y="{_TOP - 12}" text-anchor="middle" font-weight="600">kept {data["rows_kept"]:,}</text>'
    )
    height = _TOP + _HEIGHT + 130
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="Rows through the steps">{"".join(drawn)}</svg>'


def _entries(
    sources: list[tuple[str, dict[str, int]]], column: str, x: float, node: float, reach: float, scale: float, left: bool
) -> str:
    drawn, y, label_y = [], float(_TOP), 0.0
    for index, (name, counts) in enumerate(sources):
        size = counts[column] * scale
        colour = _COLOURS[index % len(_COLOURS)]
        title = f"{name}: {counts[column]:,} {column}"
        if not counts[column]:
            continue
        drawn.append(_node(node if left else x, y, size, colour, title))
        if left:
            drawn.append(_ribbon(node + _NODE, y, node + reach, y, size, colour, title))
        label_y = max(label_y + 13, y + size / 2 + 4)  # labels of thin bands move down rather than cover each other
        at, anchor = (node - 6, "end") if left else (x + _NODE + 6, "start")
        drawn.append(f'<text x="{at}" y="{label_y:.1f}" text-anchor="{anchor}">{escape(name)} {counts[column]:,}</text>')
        y += size
    return "".join(drawn)


def _node(x: float, y: float, height: float, colour: str, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.2f}" width="{_NODE}" height="{max(height, 0.5):.2f}"'
    return f'<rect {place} fill="{colour}"><title>{escape(title)}</title></rect>'


def _ribbon(x0: float, y0: float, x1: float, y1: float, height: float, colour: str, title: str) -> str:
    middle = (x0 + x1) / 2
    path = (
        f"M{x0:.1f},{y0:.2f}C{middle:.1f},{y0:.2f} {middle:.1f},{y1:.2f} {x1:.1f},{y1:.2f}V{y1 + height:.2f}"
        f"C{middle:.1f},{y1 + height:.2f} {middle:.1f},{y0 + height:.2f} {x0:.1f},{y0 + height:.2f}Z"
    )
    return f'<path d="{path}" fill="{colour}" fill-opacity=".45"><title>{escape(title)}</title></path>'


def _fall(x: float, y: float, height: float, title: str) -> str:
    """A ribbon that leaves the band to the right and turns down to its label."""
    width, bottom = max(1.0, min(height, 16.0)), _TOP + _HEIGHT + 50
    inner, outer, low = x + 8, x + 8 + width, y + 20 + height
    path = (
        f"M{x:.1f},{y:.2f}C{outer:.1f},{y:.2f} {outer:.1f},{y:.2f} {outer:.1f},{low:.2f}V{bottom}H{inner:.1f}V{low:.2f}"
        f"C{inner:.1f},{y + height:.2f} {inner:.1f},{y + height:.2f} {x:.1f},{y + height:.2f}Z"
    )
    return f'<path d="{path}" fill="{_GONE}" fill-opacity=".55"><title>{escape(title)}</title></path>'


def _steps(data: dict[str, Any]) -> str:
    rows = []
    for step in data["steps"]:
        why = ", ".join(f"{escape(reason)} {count:,}" for reason, count in step["reasons"].items())
        rows.append(
            f"<tr><td>{escape(step['title'])}</td>{_numbers(step['in'], step['removed'], step['out'])}<td>{why}</td></tr>"
        )
    head = "<tr><th>step</th><th class=n>in</th><th class=n>removed</th><th class=n>out</th><th>why</th></tr>"
    return f"<h2>Steps</h2><table>{head}{''.join(rows)}</table>"


def _sources(data: dict[str, Any]) -> str:
    titles = "".join(f"<th class=n>{escape(step['title'])}</th>" for step in data["steps"])
    rows = []
    for name, counts in data["sources"].items():
        removed = _numbers(*(step["by_source"].get(name, 0) for step in data["steps"]))
        read = _numbers(counts["read"], counts["quarantined"])
        rows.append(f"<tr><td>{escape(name)}</td>{read}{removed}{_numbers(counts['kept'])}</tr>")
    head = f"<tr><th>source</th><th class=n>read</th><th class=n>quarantined</th>{titles}<th class=n>kept</th></tr>"
    return f"<h2>Sources</h2><table>{head}{''.join(rows)}</table>"


def _examples(step: dict[str, Any]) -> str:
    drawn = []
    for example in step["examples"]:
        partner = ""
        if "partner" in example:
            score = f", {example['score']:.3f}" if "score" in example else ""
            because = f"because of {escape(example['partner'])}{score}"
            partner = f"<div class=dim>{because}</div><div class=q>{escape(example['partner_question'])}</div>"
        own = f"<div class=dim>{escape(example['id'])}: {escape(example['reason'])}</div>"
        asked = f"<div class=q>{escape(example['question'])}</div><div class=dim>answer: {escape(example['answer'])}</div>"
        drawn.append(f"<div class=pair>{own}{asked}{partner}</div>")
    return (
        f"<details><summary>Examples: {escape(step['title'])} ({step['removed']:,})</summary>{''.join(drawn)}</details>"
        if drawn
        else ""
    )


def _numbers(*values: int) -> str:
    return "".join(f"<td class=n>{value:,}</td>" for value in values)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _lines(options: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in options.items())
