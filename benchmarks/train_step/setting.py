"""What is measured: a run's configuration made from a few options, the ways to keep activations, and a mini-batch of random
tokens. The configuration goes the way of any run's, `trainer.policy.policy_options`: what is measured is the trainer."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from rollout.errors import InputError
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.batch import MiniBatch, mini_batches
from trainer.config import ModelConfig, RunConfig
from trainer.layers import kept_bytes
from trainer.planner.cost import PROMPT_TOKENS

WAYS: dict[str, dict[str, Any]] = {
    "all kept": {},
    "checkpointing": {"gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": True, "saved_gib": None},
    "offload": {"gradient_checkpointing": True, "offload_activations": True},
    "compile": {"compile": True},
    "compile, checkpointing": {"gradient_checkpointing": True, "compile": True},
}
"""What `--compare` sets in section `model`. selective: half of all that could be kept, or --saved-gib."""
SWITCHES = ("gradient_checkpointing", "saved_gib", "offload_activations", "compile")


def run_config(options: argparse.Namespace, folder: Path, model: Mapping[str, Any]) -> RunConfig:
    """folder: holds config.json, whose content is `model`. Raises InputError."""
    positions = model["max_position_embeddings"]
    if options.context > positions:
        raise InputError(f"--context: {options.context} is beyond the {positions} positions of {options.architecture}; lower it")
    prompt = min(PROMPT_TOKENS, options.context // 2)
    stage = {
        "name": "benchmark",
        "steps": 1,
        "context": options.context,
        "data": {"train": {"path": "unused"}, "max_prompt_tokens": prompt},
        "batch": {"groups": 1, "group_size": options.sequences},
        "objective": {"loss_aggregation": "token_sum", "advantage": "pshw", "clip_high": 0.28},  # the recipe's last stage
        "actor": {"tokens_per_micro_batch": options.micro_batch or options.context},
    }
    try:
        return RunConfig.model_validate(
            {
                "run": "unused",
                "seed": options.seed,
                "model": {
                    "path": folder,
                    "precision": options.dtype,
                    "weights": options.weights,
                    "attention": options.attention,
                    "gradient_checkpointing": options.checkpointing,
                    "saved_gib": options.saved_gib,
                    "offload_activations": options.offload_activations,
                    "compile": options.compile,
                },
                "optimizer": {
                    "kind": options.optimizer,
                    "offload": options.offload_optimizer,
                    "gradients": options.gradients,
                },
                "stages": [stage],
            }
        )
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(step) for step in problem["loc"])
        raise InputError(f"command line: {place + ': ' if place else ''}{problem['msg'].removeprefix('Value error, ')}") from None


def ways(config: RunConfig, names: Sequence[str], model: Mapping[str, Any]) -> dict[str, RunConfig]:
    """The configuration as it was asked for, by the name of what it does with activations, and the others of `names`."""
    found = {way_of(config.model): config}
    for name in names:
        switches = dict.fromkeys(("gradient_checkpointing", "offload_activations", "compile"), False) | {"saved_gib": 0.0}
        switches |= WAYS[name]
        if switches["saved_gib"] is None:
            switches["saved_gib"] = config.model.saved_gib or half_of_all_kept(config, model)
        other = config.model_copy(update={"model": config.model.model_copy(update=switches)})
        found.setdefault(way_of(other.model), other)
    return found


def way_of(model: ModelConfig) -> str:
    """'all kept', 'checkpointing, 0.25 GiB kept', 'checkpointing, compiled' …"""
    parts = ["checkpointing" if model.gradient_checkpointing else "all kept"]
    parts += [f"{model.saved_gib:g} GiB kept"] if model.saved_gib else []
    parts += ["inputs offloaded"] if model.offload_activations else []
    parts += ["compiled"] if model.compile else []
    return ", ".join(parts)


def half_of_all_kept(config: RunConfig, model: Mapping[str, Any]) -> float:
    """GiB, to two digits, of half of what checkpointed layers could keep."""
    itemsize = getattr(torch, config.model.precision).itemsize
    each = sum(kept_bytes(SimpleNamespace(**model), config.stages[0].actor.tokens_per_micro_batch, itemsize))
    gib = model["num_hidden_layers"] * each / 2 / 2**30
    return float(f"{gib:.2g}")


def random_batch(config: RunConfig, vocabulary: int) -> MiniBatch:
    """One group of outputs of full length, about half of them right. The sampler's log-probabilities are those of a uniform
    distribution, about what random weights give."""
    stage = config.stages[0]
    random = np.random.default_rng(config.seed)
    prompt = random.integers(0, vocabulary, stage.data.max_prompt_tokens, dtype=np.int32)
    logprobs = np.full(stage.response_limit, -math.log(vocabulary), dtype=np.float32)
    count = stage.batch.group_size
    samples = tuple(
        Sample(random.integers(0, vocabulary, stage.response_limit, dtype=np.int32), logprobs, "length", 0) for _ in range(count)
    )
    verdicts = tuple(Verdict(right, "right" if right else "wrong") for right in (index % 2 == 0 for index in range(count)))
    [batch] = mini_batches([Group(Prompt("random", "", ""), prompt, samples, verdicts, 0)], stage, step=0)
    return batch
