"""How every command of Keju ends: its exit code, and one line for what the user can mend."""

import sys
from collections.abc import Callable
from typing import NoReturn

from rollout.errors import EngineError, InputError

EXIT_INPUT = 2
EXIT_ENGINE = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for a command ended by Ctrl-C


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main` with the command line's arguments and exit with the code it returns.

    An InputError becomes one line on stderr, `keju: error: …`, and exit code 2; an EngineError, an engine that was lost for good,
    one line and exit code 3; Ctrl-C becomes exit code 130. Any other exception is a defect and keeps its traceback.
    """
    try:
        code = main(sys.argv[1:])
    except (InputError, EngineError) as error:
        # A message may quote a file's content; joined, it is one line whatever it quotes.
        print("keju: error:", " ".join(str(error).split()), file=sys.stderr)
        code = EXIT_INPUT if isinstance(error, InputError) else EXIT_ENGINE
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)
