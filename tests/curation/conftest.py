"""Hand-made tables, and the folder of real data."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.ingest import table_of
from curation.options import Options
from curation.store import Outcome, Rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data() -> Path:
    """The real data (KEJU_TEST_DATA, else ../shared/data beside the project)."""
    folder = Path(os.environ.get("KEJU_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "gsm8k" / "train.jsonl").exists():
        pytest.skip(f"no real data at {folder}; set KEJU_TEST_DATA")
    return folder


@pytest.fixture
def rows() -> Callable[..., Rows]:
    """("question", "answer") pairs, or bare questions (answered 1, 2, 3 …), as a table."""

    def made(*entries: str | tuple[str, str | None], **same: object) -> Rows:
        pairs = [entry if isinstance(entry, tuple) else (entry, str(number)) for number, entry in enumerate(entries, start=1)]
        return Rows(table_of(pairs, **same))

    return made


@pytest.fixture
def options() -> Options:
    return Options(threads=1)


def gone(outcome: Outcome) -> dict[int, str]:
    """Row number → reason."""
    return dict(zip(outcome.removed.numbers.tolist(), outcome.removed.reasons.tolist(), strict=True))
