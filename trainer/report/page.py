"""Puts the page together: template, style and scripts from assets/, the data, and the packed pieces behind it.

Texts of samples and names of folders are never to be trusted: they enter as JSON in data blocks that no parser can leave (every <
is escaped) and become text nodes in the page. The policy lets run exactly the scripts and the style that are written here, by
their hashes, and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from pathlib import Path
from typing import Any

from trainer.report.charts import choose_charts
from trainer.report.sample_store import SampleStore

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("draw.js", "formula.js", "curves.js", "samples.js", "report.js")
"""In the order in which they run; each but the last defines what the later use."""


def write_page(out: Path, runs: list[dict[str, Any]], store: SampleStore) -> None:
    """Written beside and renamed. Raises OSError where that fails."""
    data = {
        "runs": runs,
        **choose_charts([run["columns"] for run in runs], any(run["evaluations"] for run in runs)),
        "samples": store.index(),
    }
    beside = out.with_name(out.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8", errors="replace") as file:
            file.write(head(" · ".join(run["name"] for run in runs), data))
            # Behind the scripts: the list can be used while the browser still reads the pieces.
            for place, (texts, tokens) in enumerate(store.pieces):
                file.write(f'<script type="text/plain" id="texts-{place}">{texts}</script>\n')
                if tokens:
                    file.write(f'<script type="text/plain" id="tokens-{place}">{tokens}</script>\n')
            file.write("</body>\n</html>\n")
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)


def head(title: str, data: dict[str, Any]) -> str:
    """The page but for the pieces and its end."""
    style = _read("report.css")
    script = '"use strict";\n' + "\n".join(_read(name) for name in SCRIPTS)
    parts = {
        "POLICY": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        "TITLE": html.escape(title),
        "STYLE": style,
        "DATA": block(data),
        "SCRIPT": script,
    }
    # In one pass: what is put in is not looked through again, whatever it says.
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda place: parts[place[1]], _read("report.html"))


def block(data: Any) -> str:
    """JSON for a data block: nothing in it can end the block or open a comment."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _read(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
