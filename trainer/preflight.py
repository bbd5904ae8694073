"""Everything about a run that can be wrong before a model is loaded, checked in seconds and without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from rollout.prompts import PromptSource, read_prompts
from rollout.types import Prompt
from trainer.config import PromptsFile, RunConfig
from trainer.environment import check_packages
from trainer.model_folder import check_model_folder


@dataclass(frozen=True, slots=True)
class Inputs:
    """What rank 0 reads: prompt sources by file (stages that name the same file share its cursor), evaluation prompts by set."""

    sources: dict[str, PromptSource]
    evaluation: dict[str, list[Prompt]]


def check_run(config: RunConfig) -> Inputs:
    """Reads and checks all that the configuration names. Raises InputError, one line."""
    check_packages()
    check_model_folder(config.model.path)
    if any(stage.objective.kl_coefficient > 0 for stage in config.stages) and config.model.reference is not None:
        check_model_folder(config.model.reference)
    sources: dict[str, PromptSource] = {}
    for stage in config.stages:
        file = stage.data.train
        key = source_key(file)
        if key not in sources:
            sources[key] = PromptSource(read(file), seed=config.seed)
    return Inputs(sources, {each.name: read(each)[: each.limit] for each in config.evaluation.sets})


def source_key(file: PromptsFile) -> str:
    """Under which a source's cursor is saved."""
    return str(file.path)


def read(file: PromptsFile) -> list[Prompt]:
    return read_prompts(file.path, columns=file.columns, answer_pattern=file.answer_pattern)
