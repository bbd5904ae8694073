"""The one exception for what a user can mend."""


class InputError(Exception):
    """Bad input from outside (a file, a field, a value, an environment). Its text is one line that names the place, the value and
    the mend; a command prints it to stderr and exits with code 2 (`trainer.cli.run`)."""
