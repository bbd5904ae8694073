"""Decisions that were paid for, and what they cost: one SQLite file a rank in the run's folder, or memory.

A decision is found again by the content of its case and whatever else it depends on. So a run that was stopped and does a step
again gets the verdicts that it had, and asks for none of them twice. A disk that is full, or a file that turns out to be damaged,
costs that and not the run: what cannot be kept there is kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

from rollout.errors import InputError
from rollout.reward.judge.decision import Decision, schema
from rollout.reward.judge.endpoint import Spent
from rollout.reward.judge.request import PREFIX, Case, messages
from rollout.reward.judge.settings import JudgeSettings

_TABLES = """
CREATE TABLE IF NOT EXISTS decision (key BLOB PRIMARY KEY, parts TEXT NOT NULL, process INTEGER, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY CHECK (one = 1), requests INTEGER NOT NULL, tokens INTEGER NOT NULL);
INSERT OR IGNORE INTO spent VALUES (1, 0, 0);
"""


class Store:
    """path: None keeps it in memory. note: told once that the file fails. Used from the thread that made it.

    Raises InputError for a file that is none of these.
    """

    def __init__(self, path: Path | None, note: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._note, self._failed = path, note, False
        self._memory: dict[bytes, Decision] = {}
        """What the file did not take."""
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._base = sqlite3.connect(path or ":memory:", isolation_level=None)
            # Each line is kept as it comes and survives a kill; a power cut may take the file with it, which costs requests only.
            self._base.execute("PRAGMA synchronous = OFF")
            self._base.executescript(_TABLES)
            self._spent = Spent(*self._base.execute("SELECT requests, tokens FROM spent").fetchone())
        except (sqlite3.Error, OSError, TypeError) as error:  # TypeError: there is no such row
            raise InputError(f"{path}: no store of a judge's decisions ({error}); remove it, and they are asked anew") from None

    def spent(self) -> Spent:
        """As it was when the store was opened."""
        return self._spent

    def find(self, key: bytes) -> Decision | None:
        if key in self._memory:
            return self._memory[key]
        rows = self._ask("SELECT parts, process, reason FROM decision WHERE key = ?", key)
        if not rows:
            return None
        parts, process, reason = rows[0]
        return Decision(tuple(part == "1" for part in parts), None if process is None else bool(process), reason)

    def keep(self, key: bytes, decision: Decision) -> None:
        parts = "".join("1" if part else "0" for part in decision.parts)
        process = None if decision.process is None else int(decision.process)
        kept = self._ask("INSERT OR REPLACE INTO decision VALUES (?, ?, ?, ?)", key, parts, process, _whole(decision.reason))
        if kept is None:
            self._memory[key] = decision

    def keep_spent(self, spent: Spent) -> None:
        self._ask("UPDATE spent SET requests = ?, tokens = ?", spent.requests, spent.tokens)

    def _ask(self, statement: str, *values: object) -> list[tuple] | None:
        """The rows; None where the file fails."""
        try:
            return self._base.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            if not self._failed:
                mend = "free space there, or if it is damaged remove it before the next start"
                self._note(f"judge: {self._path}: {error}: decisions are kept in memory; {mend}")
            self._failed = True
            return None

    def close(self) -> None:
        self._base.close()


def key_of(case: Case, settings: JudgeSettings) -> bytes:
    """Equal keys, equal requests but for the code: of the model, the words it is asked in, and the material."""
    process = settings.process != "off"
    request = [
        settings.model,
        settings.temperature,
        settings.max_tokens,
        dict(settings.extra_body),
        messages(case, settings, code=""),
        PREFIX,
        schema(case.parts, process=process, reason_chars=settings.reason_chars),
    ]
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).digest()


def _whole(text: str) -> str:
    """JSON may write half a surrogate pair, which no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
