"""How a command of this floor ends: its exit code, and one line for what the user can mend."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rollout.errors import EngineError, InputError, RunStopped

EXIT_INPUT = 2
EXIT_ENGINE = 3
EXIT_STOPPED = 3  # as where an engine is lost: the run is kept, and someone must look before it goes on
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for a command ended by Ctrl-C


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Calls `main` with the command line's arguments and exits with the code it returns.

    An InputError becomes one line on stderr, `keju: error: …`, and exit code 2, and so does a disk that is full or takes nothing;
    an EngineError or RunStopped one line and exit code 3; Ctrl-C becomes exit code 130. Any other exception is a defect and keeps
    its traceback.
    """
    try:
        code = main(sys.argv[1:])
    except (InputError, EngineError, RunStopped, OSError) as error:
        if isinstance(error, OSError) and not refused(error):
            raise
        print("keju: error:", line_of(error), file=sys.stderr)
        code = code_of(error)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)


def line_of(error: BaseException) -> str:
    """What `error` says. It may quote a file's content: joined, it is one line whatever it quotes."""
    text = f"{error.filename}: {error.strerror}; free space there, or name another place" if refused(error) else str(error)
    return " ".join(text.split())


def code_of(error: BaseException) -> int:
    """The exit code of a command that `error` ends; 1 for a defect."""
    if isinstance(error, InputError) or refused(error):
        return EXIT_INPUT
    if isinstance(error, EngineError):
        return EXIT_ENGINE
    return EXIT_STOPPED if isinstance(error, RunStopped) else 1


def refused(error: BaseException) -> bool:
    """Whether a disk takes nothing, and which is known."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return full and error.filename is not None


def number(name: str, read: Callable[[str], Any], good: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type; name: what it calls it in "invalid … value"."""

    def parse(text: str) -> Any:
        value = read(text)
        if not good(value):
            raise ValueError
        return value

    parse.__name__ = name
    return parse


class Parser(argparse.ArgumentParser):
    """A command line that does not parse is an InputError, so it too ends in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see --help")
