"""What may go wrong from outside."""


class InputError(Exception):
    """Bad input from outside (a file, a field, a value, an environment). Its text is one line that names the place, the value and
    the mend; a command prints it to stderr and exits with code 2 (`trainer.cli.run`)."""


class EngineError(RuntimeError):
    """An engine died, hung, refused, or holds weights of an unknown version; or the judge is silent for good. One line that names
    the engine and the call; what it sampled and delivered before stays valid. Where it is lost for good, a command exits with
    code 3."""


class RunStopped(Exception):
    """A run that must not go on by itself: batches that cannot be trained on, or an alarm that was told to end it. What was
    learnt is in a checkpoint. One line that says why and what to look at; a command exits with code 3."""
