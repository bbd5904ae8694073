"""The prompt template of a run, out of its YAML, without the rest of its configuration."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from rollout.errors import InputError
from rollout.template import R1_SYSTEM


@dataclass(frozen=True, slots=True)
class Template:
    """As in `trainer.config.TemplateConfig`; system "" : none."""

    system: str = R1_SYSTEM
    prefill: str = "<think>\n"


def read_template(path: Path | None) -> Template:
    """The `template` section of a run's configuration; R1's where there is none, or no file. Raises InputError."""
    if path is None:
        return Template()
    try:
        config = yaml.safe_load(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a run's configuration, such as RUN/config.yaml") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    section = config.get("template", {}) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"{path}: template: is no section of keys; write template: {{system: …, prefill: …}}")
    for key, value in section.items():
        if key not in ("system", "prefill"):
            close = difflib.get_close_matches(str(key), ("system", "prefill"), n=1, cutoff=0.0)[0]
            raise InputError(f"{path}: template.{key}: unknown key; did you mean {close!r}?")
        if not isinstance(value, str) and not (key == "system" and value is None):
            raise InputError(f"{path}: template.{key}: {value!r} is no text; put it in quotes")
    return Template(**{key: value for key, value in section.items() if value is not None})
