"""One writer a run folder: RUN/run.lock, held by flock, with its owner's name in it and a heartbeat on its time stamp.

On one host the kernel is the judge: it drops the lock with the process. Between hosts a file system may keep locks of its own on
each, so there the heartbeat decides. Ages are differences between two stamps of that file system itself: no host's clock matters.
An owner that was frozen for so long that another host took over finds the other's name in the file when it wakes, and ends.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, TextIO

from rollout import process
from rollout.cli import EXIT_STOPPED
from rollout.errors import InputError

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""An owner that has not touched its lock for so long is frozen, or dead on another host."""


class RunLock:
    """Exclusive use of a run folder, until `release` or the end of this process.

    What a dead process left is taken over, and a line on stderr says so. Raises InputError, naming the owner, where another
    process holds the lock, or may hold it on another host.
    """

    def __init__(self, run: Path) -> None:
        self._file = _open(run)
        try:
            before, age = _examine(self._file, run)
        except BaseException:
            self._file.close()
            raise
        if before and "released" not in before:
            line = f"{run}: taken over from {named(before)}, which is gone; its last sign of life was {age:.0f} s ago"
            print(f"keju: {line}", file=sys.stderr, flush=True)
        self._path = run / LOCK_FILE
        self._owner = {
            "pid": os.getpid(), "host": socket.gethostname(), "boot": process.boot(), "started": _now(), "job": _job()
        }  # fmt: skip
        try:
            self._write(self._owner)
        except OSError as error:
            with contextlib.suppress(OSError):  # it still holds what was refused
                self._file.close()
            raise InputError(f"{run}: run: cannot be written ({error.strerror}); free space there") from None
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="keju-lock", daemon=True).start()

    @staticmethod
    def check(run: Path) -> None:
        """Raises InputError where the lock could not be taken now; leaves what is in it."""
        with _open(run) as file:
            _examine(file, run)

    def release(self) -> None:
        if self._released.is_set():
            return
        self._released.set()
        if self._successor() is None:
            with contextlib.suppress(OSError):  # a full disk: the kernel tells others that it is free
                self._write(self._owner | {"released": _now()})
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.release()

    def _write(self, content: dict[str, Any]) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(content))
        self._file.flush()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            successor = self._successor()
            if self._released.is_set():
                return
            if successor is not None:
                how = "while this process was frozen, or its lock removed"
                line = f"{self._path.parent}: taken over by {named(successor)} {how}: it ends here"
                print(f"keju: error: {line}", file=sys.stderr, flush=True)
                os._exit(EXIT_STOPPED)
            with contextlib.suppress(OSError, ValueError):  # closed in this moment, or a file system that is away
                os.utime(self._file.fileno())

    def _successor(self) -> dict[str, Any] | None:
        """Who has taken the folder from this process; None while it is its own."""
        try:
            owner = _owner_in(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return None if "pid" not in owner or _same(owner, self._owner) else owner


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("pid", "host", "boot", "started"))


def _open(run: Path) -> TextIO:
    try:
        run.mkdir(parents=True, exist_ok=True)
        return open(run / LOCK_FILE, "a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{run}: run: cannot be used as a run folder ({error.strerror}); name another") from None


def _examine(file: TextIO, run: Path) -> tuple[dict[str, Any], float]:
    """Locks the file. Returns (who had it before, seconds since that one's last sign of life)."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = False
    except BlockingIOError:
        held = True
    except OSError as error:
        raise InputError(f"{run}: run: its file system cannot lock ({error.strerror}); name another run folder") from None
    try:
        file.seek(0)
        before = _owner_in(file.read())
        age = _age(file.fileno(), run)
    except OSError as error:
        raise InputError(f"{run}: run: cannot be read and written ({error.strerror}); mend that or name another folder") from None
    if held or _may_live(before, age):
        raise InputError(f"{run}: run: {refusal(before, age, held=held)}")
    return before, age


def _may_live(before: dict[str, Any], age: float) -> bool:
    """Whether an owner on another host, whose lock this one may not see, still runs. A job that torchrun restarts on another host
    is the same job, and torchrun has ended what ran before."""
    if "host" not in before or "released" in before or _here(before):
        return False
    same_job = _job() not in ("", "none") and before.get("job") == _job()
    return age < STALE_SECONDS and not same_job


def _here(owner: dict[str, Any]) -> bool:
    """Whether its lock is in the hands of this kernel. Two hosts may have one name."""
    return owner.get("host") == socket.gethostname() and owner.get("boot", process.boot()) == process.boot()


def refusal(owner: dict[str, Any], age: float, *, held: bool) -> str:
    """Why, and what to do."""
    who = named(owner)
    if not held:
        return (
            f"in use by a living run ({who}, last sign of life {age:.0f} s ago); stop it or name another run folder; if it is "
            f"dead, the folder is free {STALE_SECONDS:g} s after that"
        )
    if age < STALE_SECONDS:
        return f"in use by a living run ({who}); stop it or name another run folder"
    state = process.state(owner["pid"]) if _here(owner) and "pid" in owner else None
    how = f" (state {state})" if state else ""
    return (
        f"held by {who}, which seems to be frozen{how}: no sign of life for {age:.0f} s; wake it (kill -CONT {owner.get('pid')}) "
        f"or end it (kill -KILL {owner.get('pid')}), or name another run folder"
    )


def named(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return "an unknown process"
    started = f", started {owner['started']}" if "started" in owner else ""
    return f"process {owner['pid']} on {owner.get('host', 'an unknown host')}{started}"


def _owner_in(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _age(descriptor: int, run: Path) -> float:
    """Seconds since an open file was touched, by the clock of its own file system."""
    touched = os.fstat(descriptor).st_mtime_ns
    with tempfile.TemporaryFile(dir=run) as probe:  # without a name where the system can, so that the folder stays as it is
        os.utime(probe.fileno())
        return max(0, os.fstat(probe.fileno()).st_mtime_ns - touched) / 1e9


def _job() -> str:
    """torchrun's name of the job, "none" where nobody gave it one."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def _now() -> str:
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC"
