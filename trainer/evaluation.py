"""Held-out problems under the current weights: pass@1 as the mean correctness of k sampled outputs (the paper: temperature 1.0,
top-p 0.7)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rollout.engine import Decoding
from rollout.errors import InputError
from rollout.ranks import Ranks
from rollout.sampler import Sampler
from rollout.types import Group, Prompt
from trainer.config import RunConfig
from trainer.preflight import Inputs
from trainer.text import load_tokenizer, prompt_encoder

SEED = (2**31, 0)
"""Evaluations draw from seeds of their own, the same ones each time: what differs between two of them is the policy."""


def check_room(config: RunConfig, inputs: Inputs | None, ranks: Ranks) -> None:
    """Raises InputError, on every rank alike, where an evaluation prompt leaves the engines' longest context less than a whole
    response: an engine refuses such a prompt, or cuts its outputs short. A collective. inputs: on rank 0 alone."""
    fault = None
    if inputs is not None:
        try:
            _check_room(config, inputs.evaluation)
        except InputError as error:
            fault = str(error)
    if (fault := ranks.broadcast(fault)) is not None:
        raise InputError(fault)


def _check_room(config: RunConfig, sets: Mapping[str, Sequence[Prompt]]) -> None:
    room = config.max_tokens - config.evaluation_response_limit
    encode = prompt_encoder(load_tokenizer(config.model.path), config.template) if sets else None
    for each in config.evaluation.sets:
        lengths = {prompt.id: len(encode(prompt)) for prompt in sets[each.name]}
        long = {name: tokens for name, tokens in lengths.items() if tokens > room}
        if long:
            longest = max(long, key=long.get)
            raise InputError(
                f"{each.path}: evaluation set {each.name}: {len(long)} of {len(lengths)} prompts are too long, the longest, "
                f"{longest}, with {long[longest]} tokens; at most {room} leave room for the response; raise "
                "data.max_prompt_tokens, or leave them out"
            )


def evaluate(
    sampler: Sampler, sets: Mapping[str, Sequence[Prompt]], config: RunConfig, ranks: Ranks, step: int
) -> list[dict[str, Any]]:
    """One eval row a set, in the configuration's order; on ranks other than 0 an empty list. A collective. Prompts are not
    counted in the ledger."""
    settings = config.evaluation
    decoding = Decoding(config.evaluation_response_limit, settings.temperature, settings.top_p, settings.greedy)
    rows = []
    for index, each in enumerate(settings.sets):
        start = time.perf_counter()
        prompts = ranks.broadcast(sets[each.name] if ranks.first else None)
        groups = sampler.sample_groups(
            prompts, settings.k, decoding, seed=(*SEED, index), step=step, phase="evaluate", note=each.name
        )
        if ranks.first:
            rows.append(
                {
                    "kind": "eval",
                    "step": step,
                    "name": each.name,
                    **summarize(groups),
                    "time/evaluate": time.perf_counter() - start,
                }
            )
    return rows


def summarize(groups: Sequence[Group]) -> dict[str, Any]:
    """pass@1, counts, mean length in tokens, shares of truncated, of misformatted and, if any, of unjudged outputs. pass@1 is
    over the judged ones; None where there is none."""
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    judged = sum(verdict.judged for verdict in verdicts)
    lengths = [len(sample.token_ids) for group in groups for sample in group.samples]
    unjudged = {"unjudged": 1 - judged / len(verdicts)} if judged < len(verdicts) else {}
    return {
        "pass@1": sum(verdict.right for verdict in verdicts) / judged if judged else None,
        "count": len(groups),
        "k": len(groups[0].samples),
        "length/mean": sum(lengths) / len(lengths),
        "truncated": sum(verdict.reason == "truncated" for verdict in verdicts) / len(verdicts),
        "format": sum(verdict.reason == "format" for verdict in verdicts) / len(verdicts),
        **unjudged,
    }
