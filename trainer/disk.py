"""A disk that refuses, as one kind of error: OSError with its number, whichever library was writing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_NUMBER = re.compile(r"\(os error (\d+)\)")


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Around what safetensors writes to `path`: its own error, which is no OSError, becomes one where the system refused."""
    try:
        yield
    except SafetensorError as error:
        if (found := _NUMBER.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
