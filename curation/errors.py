"""What may go wrong from outside. The package stands alone, so it has its own."""


class InputError(Exception):
    """Bad input (a file, a field, a value, an option). Its text is one line that names the place, the value and the mend; the
    command prints it to stderr as `keju: error: …` and exits with code 2 (`curation.__main__`)."""


SHOWN = 60
"""How many characters of a wrong value a message shows."""


def shown(value: object) -> str:
    """`value` as a short single line for a message."""
    if isinstance(value, str | bytes):
        value = value[: SHOWN + 1]  # a repr of 50 MB only to cut it is not for free
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
