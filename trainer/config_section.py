"""What every section of a configuration is, and the kinds of numbers in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """An unknown key is an error, and a configuration does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_a_path(cls, value: Any) -> Any:
        if isinstance(value, Path):
            if "\0" in str(value):
                raise ValueError("a path cannot hold a NUL character; name another")
            longest = max((len(os.fsencode(part)) for part in value.parts), default=0)
            if longest > 255 or len(os.fsencode(value)) > 4000:
                raise ValueError(f"a path of {len(str(value)):,} characters is too long for a file system; name a shorter one")
        return value
