"""Where in each prompts file a run goes on. A checkpoint names a cursor by its file's path; what is in the file decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rollout.errors import InputError
from rollout.prompts import PromptSource
from trainer.config import RunConfig
from trainer.preflight import source_key


def go_on(config: RunConfig, sources: dict[str, PromptSource], saved: dict[str, dict[str, Any]], step: int) -> dict[str, str]:
    """Moves the sources to where they were after `step` finished steps. saved: file → cursor (`PromptSource.state`); one whose
    file is not read any more is taken for the same prompts in another place. Returns old → new name of those.

    Raises InputError where the stage under way would go on over other prompts than it began with.
    """
    left = {name: cursor for name, cursor in saved.items() if name not in sources}
    moved: dict[str, str] = {}
    for key, source in sources.items():
        same = [name for name, cursor in left.items() if source.is_of(cursor)]
        same.sort(key=lambda name, key=key: Path(name).name != Path(key).name)  # of equal prompts those in a file of that name
        if key in saved:
            source.load(saved[key])
        elif same:
            source.load(left.pop(same[0]))
            moved[same[0]] = key
    index = config.stage_of(min(step, config.total_steps - 1))
    file = config.stages[index].data.train
    if step > sum(stage.steps for stage in config.stages[:index]) and source_key(file) not in {*saved, *moved.values()}:
        raise InputError(
            f"{file.path}: stages[{index}].data.train.path: other prompts than this stage began with (the checkpoint of step "
            f"{step} goes on in {', '.join(saved) or 'none'}); give the run its old file, or start anew"
        )
    return moved
