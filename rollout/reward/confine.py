"""What a process that judges an answer may not do: leave a process behind, write a file, run a program.

It leads a session of its own, so that one signal ends its whole group; it has the file descriptor that it is given and the
standard three, no other; its limits on file size, core size and processes are 0. Root is exempt from the limit on processes, and
a process that is started may leave the group; so the kernel also refuses it the system calls that make one (seccomp; Linux on
x86-64 and arm64). Elsewhere the limits and the group are all there is.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

from rollout.environment import without_secrets

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # _REFUSE: the call fails with EPERM
_MACHINES = {
    # clone, fork, vfork, execve, execveat, clone3
    "x86_64": (0xC000003E, (56, 57, 58, 59, 322, 435)),
    "aarch64": (0xC00000B7, (220, 221, 281, 435)),
}
"""Machine → (its number in seccomp's data, the numbers of the system calls that start a process or a program)."""
_X32 = 0x40000000
"""x86-64's second table of system calls begins here."""


def confine(kept: int) -> None:
    """Bound the calling process for the rest of its life. kept: its one file descriptor beside the standard three."""
    os.setsid()
    for name in set(os.environ) - set(without_secrets(os.environ)):
        del os.environ[name]
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    _refuse_processes()


def _refuse_processes() -> None:
    """A kernel without seccomp refuses the filter, and then there is none."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return
    number, calls = _MACHINES[platform.machine()]
    steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, number), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps.append((_IF_AT_LEAST, len(calls) + 1, 0, _X32))
    steps += [(_IF_EQUAL, len(calls) - place, 0, call) for place, call in enumerate(calls)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    unsigned = ctypes.c_ulong
    libc.prctl(_PR_SET_NO_NEW_PRIVS, unsigned(1), unsigned(0), unsigned(0), unsigned(0))
    libc.prctl(_PR_SET_SECCOMP, unsigned(_SECCOMP_MODE_FILTER), program, unsigned(0), unsigned(0))
