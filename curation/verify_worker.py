"""A verification worker: math-verify, on one answer against itself. Started as a script of its own by
`curation.steps.verifiable`; it imports nothing of ours, and nothing heavy beside SymPy.

It says "ready", then answers each line of its standard input, a JSON list of answers, with one, a JSON list of verdicts.

Nothing here bounds its own time: SymPy can spend minutes inside one C call, where no signal handler gets a turn. The parent
holds the clock and kills the process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys

MEMORY_BYTES = 4 * 2**30
_PR_SET_PDEATHSIG = 1
_DELIMITED = re.compile(r"(?<!\\)\$.+?(?<!\\)\$|\\\(|\\\[|\\boxed", re.DOTALL)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")


def start(parent: int) -> None:
    """Die with process `parent`, leave Ctrl-C to it, take no more than MEMORY_BYTES, load the library off the clock."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes
        import resource

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    if os.getppid() != parent:
        os._exit(1)
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    import math_verify  # noqa: F401


def verify_itself(answer: str) -> str:
    """Why math-verify does not find the answer equal to itself when a model puts it in a \\boxed{}: "" (it does), `unreadable`
    (nothing was found in it), `unequal`, or `error`."""
    from math_verify import parse, verify

    bare = answer.strip()
    if not _DELIMITED.search(bare):
        bare = (
            rf"\text{{{bare}}}" if _WORDS.fullmatch(bare) and len(bare) > 2 else bare.replace(r"\$", "").replace("$", "").strip()
        )
        gold_text, said = f"${bare}$", rf"\boxed{{{bare}}}"
    else:
        inside = re.fullmatch(r"\$\$?([^$]+)\$\$?", bare)
        gold_text, said = bare, rf"\boxed{{{inside[1]}}}" if inside else bare
    try:
        gold = parse(gold_text, parsing_timeout=None)
        if not gold:
            return "unreadable"
        return "" if verify(gold, parse(said, parsing_timeout=None), timeout_seconds=None) else "unequal"
    except Exception:
        return "error"


def main() -> None:
    start(int(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps([verify_itself(answer) for answer in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
