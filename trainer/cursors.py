"""Where in each prompts file a run goes on. A checkpoint names a cursor by its file's path; what is in the file decides."""

from __future__ import annotations

from typing import Any

from rollout.errors import InputError
from rollout.prompts import PromptSource
from trainer.config import RunConfig
from trainer.preflight import source_key


def go_on(config: RunConfig, sources: dict[str, PromptSource], saved: dict[str, dict[str, Any]], step: int) -> None:
    """Moves the sources to where they were after `step` finished steps. saved: file → cursor (`PromptSource.state`); one whose
    file is not read any more is taken for the same prompts in another place.

    Raises InputError where the stage under way would go on over other prompts than it began with.
    """
    left = {name: cursor for name, cursor in saved.items() if name not in sources}
    found = set()
    for key, source in sources.items():
        moved = next((name for name, cursor in left.items() if source.is_of(cursor)), None)
        if key in saved:
            source.load(saved[key])
        elif moved is not None:
            source.load(left.pop(moved))
        else:
            continue
        found.add(key)
    index = config.stage_of(min(step, config.total_steps - 1))
    file = config.stages[index].data.train
    if step > sum(stage.steps for stage in config.stages[:index]) and source_key(file) not in found:
        raise InputError(
            f"{file.path}: stages[{index}].data.train.path: other prompts than this stage began with (the checkpoint of step "
            f"{step} goes on in {', '.join(saved) or 'none'}); give the run its old file, or start anew"
        )
