"""Reads a run's YAML and command-line overrides into a `RunConfig`, and turns whatever is wrong into one line.

FILE: stages[1].objective.clip_hihg: unknown key (value 0.28); did you mean 'clip_high'?
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rollout.errors import InputError
from trainer.config import STAGE_SECTIONS, RunConfig

Location = tuple[int | str, ...]
MOST_VALUES = 100_000
MOST_NESTED = 50
MOST_BYTES = 1 << 20


def load_config(path: Path, overrides: list[str] = ()) -> RunConfig:
    """Reads `path` (UTF-8 YAML), applies overrides such as "actor.lr=1e-6" or "stages[0].steps=3" and validates.

    Raises InputError, one line naming file, key, value and mend.
    """
    raw = _read_yaml(path)
    for override in overrides:
        _apply_override(raw, override)
    _check_size(path, raw)
    merged, origin = _merge_stages(raw)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise InputError(f"{path}: {_describe(error, origin)}") from None


def dump_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML, every default and every stage spelt out; `load_config` reads it back equal."""
    text = yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-6 as a string and keeps the last of two equal keys: here it is a number, and they are an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list)):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        if len(content) > MOST_BYTES:
            raise InputError(f"{path}: has {len(content):,} bytes, more than any configuration; see configs/demo.yaml")
        raw = yaml.load(content.decode("utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a configuration such as configs/demo.yaml") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(f"{path}: line {line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({_short(str(error))})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds {_short(raw)}, not a mapping of keys; see configs/demo.yaml")
    return raw


def _check_size(path: Path, raw: Any) -> None:
    """Refuses what no configuration is: aliases that stand for millions of values or for what they stand in, nesting without end,
    and half characters. What comes after may then write any part of it out."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(value: Any, depth: int) -> int:
        if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise InputError(f"{path}: {_short(value)} has half a surrogate pair; write the character whole")
        if not isinstance(value, dict | list | set):
            return 1
        if id(value) in inside or depth > MOST_NESTED:
            raise InputError(f"{path}: keys and lists are nested more than {MOST_NESTED} deep; see configs/demo.yaml")
        if id(value) not in sizes:
            inside.add(id(value))
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(part, depth + 1) for part in parts)
            inside.discard(id(value))
        return sizes[id(value)]

    if size(raw, 0) > MOST_VALUES:
        raise InputError(f"{path}: its aliases (*) stand for more than {MOST_VALUES:,} values; write out what is meant")


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+|\[\d+\])*", key):
        raise InputError(f"command line: {override!r} is not of the form key.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2024-13-45
        raise InputError(f"command line: {key}: {_short(text)} is not a YAML value") from None
    steps = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", key)]
    place: Any = raw
    for at, (step, following) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
        if isinstance(place, list):
            if not isinstance(step, int) or step >= len(place):
                raise InputError(f"command line: {key}: {step!r} is no index of a list of {len(place)}")
        elif not isinstance(place, dict):
            raise InputError(f"command line: {key}: '{_dotted(tuple(steps[:at]))}' holds {_short(place)}, which has no keys")
        if following is None:
            place[step] = value
        else:
            if isinstance(place, dict) and place.get(step) is None:
                place[step] = {}
            place = place[step]


def _merge_stages(raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(raw with the shared sections merged into each stage, raw as written, to tell where a wrong key stands)."""
    merged = copy.deepcopy(raw)
    shared = {name: merged.pop(name) for name in STAGE_SECTIONS if name in merged}
    stages = merged.get("stages")
    if isinstance(stages, list):
        merged["stages"] = [_overlay(shared, stage) if isinstance(stage, dict) else stage for stage in stages]
    return merged, raw


def _overlay(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {
            key: _overlay(base[key], over[key]) if key in base and key in over else over.get(key, base.get(key))
            for key in base | over
        }
    return copy.deepcopy(over)


def _describe(error: ValidationError, origin: dict[str, Any]) -> str:
    """The first mistake as 'key: what is wrong (value …); mend'. Unknown keys first: one misspelt makes its right one missing."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location: Location = problem["loc"]
    shown = _dotted(_where_written(location, origin))
    if problem["type"] == "extra_forbidden":
        near = _nearest(str(location[-1]), _keys_at(location[:-1]))
        mend = f"; did you mean '{near}'?" if near else f"; valid keys: {', '.join(sorted(_keys_at(location[:-1])))}"
        return f"{shown}: unknown key (value {_short(problem['input'])}){mend}"
    if problem["type"] == "missing":
        return f"{shown}: missing; add this key"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{shown}: must be a section of keys, found {_short(problem['input'])}"
    if problem["type"] == "value_error":
        return f"{shown + ': ' if shown else ''}{problem['ctx']['error']}"
    return f"{shown}: {problem['msg'].lower()}, found {_short(problem['input'])}"


def _where_written(location: Location, origin: dict[str, Any]) -> Location:
    """A mistake inside a stage's section that the stage did not write itself stands in the shared section."""
    if len(location) < 3 or location[0] != "stages" or location[2] not in STAGE_SECTIONS:
        return location
    place: Any = origin
    for step in location:
        try:
            place = place[step]
        except (KeyError, IndexError, TypeError):
            return location[2:] if location[2] in origin else location
    return location


def _keys_at(location: Location) -> list[str]:
    """Valid keys of the section at `location`; at the top level also the shared sections."""
    model: Any = RunConfig
    for step in location:
        if isinstance(step, int):
            continue
        model = _section_type(model.model_fields[step].annotation) if step in getattr(model, "model_fields", {}) else None
        if model is None:
            return []
    keys = list(model.model_fields)
    return keys + list(STAGE_SECTIONS) if model is RunConfig else keys


def _section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `tuple[StageConfig, ...]` or `WarmupConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_type(inner)) is not None:
            return found
    return None


def _nearest(word: str, words: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.6)), None)


def _dotted(location: Location) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "…"
