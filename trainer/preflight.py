"""Everything about a run that can be wrong before a model is loaded, checked in seconds and without importing torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rollout.errors import InputError
from rollout.model_folder import longest_context
from rollout.prompts import PromptSource, read_prompts
from rollout.reward.correctness import needs_judge
from rollout.reward.judge.settings import JudgeSettings
from rollout.reward.judge.verifier import check_endpoint
from rollout.reward.rule import check_prompt
from rollout.types import Prompt
from trainer.config import PromptsFile, RunConfig
from trainer.config_reward import JudgeConfig
from trainer.environment import check_packages
from trainer.model_folder import check_full_precision_folder


@dataclass(frozen=True, slots=True)
class Inputs:
    """What rank 0 reads: prompt sources by file (stages that name the same file share its cursor), evaluation prompts by set."""

    sources: dict[str, PromptSource]
    evaluation: dict[str, list[Prompt]]


def check_run(config: RunConfig) -> Inputs:
    """Reads and checks all that the configuration names. Raises InputError, one line."""
    check_packages()
    check_full_precision_folder(config.model.path)
    if any(stage.objective.kl_coefficient > 0 for stage in config.stages) and config.model.reference is not None:
        check_full_precision_folder(config.model.reference)
    check_engine(config)
    sources: dict[str, PromptSource] = {}
    for stage in config.stages:
        file = stage.data.train
        key = source_key(file)
        if key not in sources:
            sources[key] = PromptSource(read(file), seed=config.seed)
    inputs = Inputs(sources, {each.name: read(each)[: each.limit] for each in config.evaluation.sets})
    check_judge(config, inputs)
    check_rule(config, inputs)
    return inputs


def check_rule(config: RunConfig, inputs: Inputs) -> None:
    """Raises InputError where a prompt for the rule is a puzzle that it cannot score."""
    for place, prompts in _places(inputs):
        for prompt in prompts:
            if not needs_judge(prompt):
                check_prompt(config.reward.rule, f"{place}: prompt {prompt.id}", prompt)


def _places(inputs: Inputs) -> list[tuple[str, Sequence[Prompt]]]:
    return [(key, source.prompts) for key, source in inputs.sources.items()] + list(inputs.evaluation.items())


def check_judge(config: RunConfig, inputs: Inputs) -> None:
    """Raises InputError where prompts are for a judge and there is none, or where it gives no verdict on a small question."""
    asking = 0
    for place, prompts in _places(inputs):
        for prompt in prompts:
            value = prompt.metadata.get("judge", False)
            if not isinstance(value, bool):
                raise InputError(f"{place}: prompt {prompt.id}, metadata.judge: {value!r} is not true or false; make it one")
        marked = sum(needs_judge(prompt) for prompt in prompts)
        if marked and config.reward.judge is None:
            raise InputError(
                f"{place}: {marked} of {len(prompts)} prompts are for a judge (metadata.judge), and the run has none; set "
                "reward.judge.base_url and reward.judge.model, or leave those prompts out"
            )
        asking += marked
    if asking:
        check_endpoint(judge_settings(config.reward.judge))


def judge_settings(judge: JudgeConfig) -> JudgeSettings:
    return JudgeSettings(**judge.model_dump(exclude={"max_unjudged_rounds"}))


def check_engine(config: RunConfig) -> None:
    """Raises InputError where the engine's package is missing or the model's positions do not reach as far as the run's
    contexts."""
    if config.engine.kind == "vllm" and importlib.util.find_spec("vllm") is None:
        raise InputError("engine.kind: vllm needs the package vllm; run: make setup, or set engine.kind to transformers")
    model = json.loads((config.model.path / "config.json").read_text(encoding="utf-8"))
    heads = model.get("num_attention_heads", config.engine.tensor_parallel)
    if heads % config.engine.tensor_parallel:
        raise InputError(
            f"engine.tensor_parallel: {config.engine.tensor_parallel} does not divide the model's {heads} attention heads "
            f"({config.model.path}/config.json); set it to a divisor"
        )
    positions = longest_context(model)
    if not config.engine.embedded and positions and config.max_tokens > positions:
        raise InputError(
            f"{config.model.path}/config.json: max_position_embeddings: {positions} is less than the {config.max_tokens} tokens "
            "of the run's longest context or evaluation; lower stages[].context or evaluation.max_new_tokens"
        )


def source_key(file: PromptsFile) -> str:
    """Under which a source's cursor is saved."""
    return str(file.path)


def read(file: PromptsFile) -> list[Prompt]:
    return read_prompts(file.path, columns=file.columns, answer_pattern=file.answer_pattern)
