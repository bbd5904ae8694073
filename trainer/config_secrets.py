"""No secret stands in a configuration: it is written to the run folder, shown in errors, and may come from a command line that
every user of the machine can read. Keys come from the environment, and a configuration names the variable. No message holds the
value."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

NAME = re.compile(
    r"(^|[_-])(api[_-]?key|secret([_-]?key)?|password|passwd|authori[sz]ation|bearer|credentials?|"
    r"(access|auth|api|bearer|refresh|session|id)[_-]?token)$",
    re.IGNORECASE,
)
"""Of a key whose value is one."""
VALUE = re.compile(r"^\s*(Bearer\s|Basic\s|sk-|sk_|hf_|ghp_|glpat-|xox[bp]-|AKIA|eyJ[\w-]+\.)", re.IGNORECASE)
"""How known ones begin."""


def variable_name(value: str) -> str:
    """The name of an environment variable, in capitals, so that a key put there by mistake is told from a name."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,99}", value):
        raise ValueError(
            "this is the name of an environment variable, in capitals, such as KEJU_API_KEY; the key itself goes there"
        )
    return value


def without_secret(value: Any, at: str = "") -> Any:
    """The value. Raises ValueError where this tree of a configuration holds what looks like a key."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, child in children:
        place = f"{at}.{name}" if at else str(name)
        if (isinstance(name, str) and NAME.search(name)) or (isinstance(child, str) and VALUE.search(child)):
            raise ValueError(f"{place} looks like a secret, and configurations are written down; put it into the environment")
        without_secret(child, place)
    return value


VariableName = Annotated[str, AfterValidator(variable_name)]
NoSecrets = Annotated[dict[str, Any], AfterValidator(without_secret)]
