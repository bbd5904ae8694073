"""A page that a file sends its reader to is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "configs", "csrc", "curation", "docs", "kernels", "rollout", "tests", "trainer")
PAGE = re.compile(r"(?<!\w/)\bdocs/[\w.-]+\.md\b")  # not one of another repository's


def test_every_page_that_is_named_exists():
    files = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md", ".yaml")}
    named = {(str(path.relative_to(ROOT)), page) for path, text in texts.items() for page in PAGE.findall(text)}
    assert len(named) > 20
    assert sorted((path, page) for path, page in named if not (ROOT / page).is_file()) == []
