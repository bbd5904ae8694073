"""The command, and how it ends: an InputError is one line on stderr, `keju: error: …`, and exit code 2; Ctrl-C is exit code
130. Any other exception is a defect and keeps its traceback. Verification workers import this module again, so it imports the
rest late."""

import sys


def run() -> None:
    from curation.cli import main
    from curation.errors import InputError

    try:
        code = main(sys.argv[1:])
    except InputError as error:
        # A message may quote a file's content; joined, it is one line whatever it quotes.
        print("keju: error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run()
