"""What a process may ask the system about another one, and for: its state, and to die with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)  # not looked for in a process that was just forked
_PR_SET_PDEATHSIG = 1
_M_ARENA_MAX = -8  # malloc.h
ARENAS = 2

STATES = {
    "R": "running",
    "S": "waiting",
    "D": "in an uninterruptible wait of the kernel (a disk, a network file system, a driver)",
    "T": "frozen (state T)",
    "t": "held by a debugger (state t)",
    "Z": "dead",
    "X": "dead",
}
"""What Linux's letters mean (proc(5))."""


def die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the THREAD that started this process ends; outlived already, end at once. Elsewhere than on
    Linux only the second."""
    if sys.platform == "linux":
        if _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def few_arenas() -> None:
    """From here on glibc keeps memory in at most ARENAS heaps, and not in eight a core: a thread that comes and goes, as the one
    that writes a checkpoint, leaves a little in another one each time. Nothing without glibc. To be called before threads are."""
    with contextlib.suppress(AttributeError):
        _LIBC.mallopt(_M_ARENA_MAX, ARENAS)


def state(pid: int) -> str | None:
    """Linux's letter; None for a process that is gone. "?" where the system does not tell."""
    if (fields := _fields(pid)) is not None:
        return fields[0]
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "?"


def alive(pid: int, born: int) -> bool:
    """Whether this very process is there and no zombie. born: as `birth` gave it."""
    return state(pid) not in (None, "Z", "X") and birth(pid) == born


def birth(pid: int) -> int:
    """When it was started, in the kernel's ticks: with the pid it names one process for good. 0 where the system does not say."""
    fields = _fields(pid)
    return 0 if fields is None else int(fields[19])


def kill(pid: int, born: int) -> None:
    """SIGKILL, to this very process."""
    if alive(pid, born):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def kernel_wait(pid: int) -> str:
    """Where in the kernel it waits; "" where that is nowhere or unknown."""
    place = _first_line(f"/proc/{pid}/wchan")
    return "" if place == "0" else place


def boot() -> str:
    """Names this start of this machine, whatever its host name; "" where the system does not tell."""
    return _first_line("/proc/sys/kernel/random/boot_id")


def space() -> str:
    """Where a pid means the same process: a boot, and in it a container's own numbering. "" where the system does not tell."""
    try:
        return f"{boot()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def command_line(pid: int) -> str:
    """ "" where the system does not tell."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
