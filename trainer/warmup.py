"""`python -m trainer.warmup CONFIG`: teaches a base model the R1 form by supervised learning on worked solutions.

Writes model.path (which the RL run starts from) from warmup.base. Loss: mean over the sequences of each one's mean negative
log-probability over its response tokens, through the same packed batches and loss head as RL. Not resumable: it is short.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rollout.errors import InputError, RunStopped
from rollout.types import Prompt
from trainer import launch
from trainer.config import ActorConfig, RunConfig, WarmupConfig
from trainer.config_file import load_config
from trainer.console import Console, NullConsole
from trainer.environment import check_packages
from trainer.guards import Guard, fault_of
from trainer.model_folder import check_full_precision_folder, save_model_folder
from trainer.preflight import read


def main(arguments: list[str]) -> int:
    if launch.is_rank():
        launch.die_with_torchrun()
    options = launch.parse("trainer.warmup", "Supervised warm-up on worked solutions in the R1 form.", arguments)
    config = load_config(options.config, options.overrides)
    prompts = check(config, options.config)
    if options.check:
        return 0
    if options.ranks > 1 and not launch.is_rank():
        return launch.torchrun("trainer.warmup", options)
    warm_up(config, prompts)
    return 0


def check(config: RunConfig, path: Path) -> list[Prompt]:
    """The prompts to learn from. Raises InputError, one line, for whatever a user can mend."""
    check_packages()
    if config.warmup is None:
        raise InputError(
            f"{path}: warmup: missing; add this section (base, data, steps) or start training from model.path as it is"
        )
    check_full_precision_folder(config.warmup.base)
    prompts = read(config.warmup.data)
    if (without := sum(prompt.solution is None for prompt in prompts)) == len(prompts):
        raise InputError(
            f"{config.warmup.data.path}: warmup.data: none of the {without} prompts has a solution; "
            "map one with warmup.data.columns.solution"
        )
    if config.model.path.exists():
        raise InputError(
            f"{config.model.path}: model.path: exists, and the warm-up would write it; remove it or name another folder"
        )
    return [prompt for prompt in prompts if prompt.solution is not None]


def warm_up(config: RunConfig, prompts: list[Prompt]) -> None:
    """On every rank."""
    import torch

    from trainer.actor import Actor
    from trainer.batch import MiniBatch
    from trainer.distributed import process_group
    from trainer.policy import build_policy, policy_options
    from trainer.setup import precision_of
    from trainer.text import end_tokens, load_tokenizer, prompt_encoder

    settings = config.warmup
    actor_config = ActorConfig(
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        tokens_per_micro_batch=max(settings.max_tokens, config.stages[0].actor.tokens_per_micro_batch),
    )
    tokenizer = load_tokenizer(settings.base)
    encode = example_encoder(
        tokenizer, prompt_encoder(tokenizer, config.template), end_tokens(settings.base, tokenizer)[0], settings, config
    )
    with process_group(config.parallel.timeout_seconds, config.parallel.shard_ranks) as (ranks, mesh, device), (
        Console(settings.steps, [(0, "warm-up", settings.steps)]) if ranks.first else NullConsole()
    ) as console:  # fmt: skip
        options = policy_options(config, precision_of(config.model, device), device)
        policy = build_policy(settings.base, mesh, replace(options, weights=torch.float32))  # trained by AdamW in fp32
        actor = Actor(policy, actor_config, rank=ranks.rank, ranks=ranks.size, device=device)
        guard = Guard(config.guards, None, console.note)
        batches = batches_of(prompts, encode, settings, config.seed, console.note)
        with console.phase("warm-up", settings.steps, "steps") as bar:
            for step in range(1, settings.steps + 1):
                loss, grad_norm = actor.update_supervised(MiniBatch(next(batches)), actor_config)
                guard.see(step, [fault_of(loss, grad_norm=grad_norm)])
                if (why := guard.why_stop()) is not None:
                    raise RunStopped(f"warm-up: {why}; nothing was written to {config.model.path}")
                bar.advance(1, loss=f"{loss:.3f}")
                if step % max(1, settings.steps // 10) == 0:
                    console.note(f"warm-up step {step} of {settings.steps}: loss {loss:.4f}")
        save_model_folder(policy, settings.base, config.model.path, first=ranks.first)


def example_encoder(
    tokenizer: Any, encode: Callable[[Prompt], list[int]], end: int, settings: WarmupConfig, config: RunConfig
) -> Callable[[Prompt], Any]:
    """Prompt → token sequence of prompt and worked solution in the R1 form, ended; None where it is longer than max_tokens."""
    from trainer.batch import TokenSequence

    patterns = [re.compile(pattern, re.MULTILINE) for pattern in settings.strip]

    def example(prompt: Prompt) -> TokenSequence | None:
        text = response_text(prompt, patterns, config.template.prefill)
        question = np.asarray(encode(prompt), dtype=np.int32)
        response = np.asarray([*tokenizer(text, add_special_tokens=False)["input_ids"], end], dtype=np.int32)
        if len(question) + len(response) > settings.max_tokens:
            return None
        return TokenSequence(
            question, response, np.zeros(len(response), np.float32), 0.0, 1 / (settings.sequences * len(response))
        )

    return example


def response_text(prompt: Prompt, strip: list[re.Pattern[str]], prefill: str) -> str:
    """'<think>' + solution + '</think>' + answer, without the part that the prompt's prefill already holds."""
    thinking = prompt.solution
    for pattern in strip:
        thinking = pattern.sub("", thinking)
    text = f"<think>\n{thinking.strip()}\n</think>\n<answer>{prompt.answer}</answer>"
    return text.removeprefix(prefill)


def batches_of(
    prompts: list[Prompt], encode: Callable[[Prompt], Any], settings: WarmupConfig, seed: int, note: Callable[[str], None]
) -> Iterator[tuple]:
    """Endless batches of `settings.sequences`, shuffled by (seed, epoch); the same on every rank."""
    examples = [example for example in map(encode, prompts) if example is not None]
    if len(examples) < len(prompts):
        note(f"{len(prompts) - len(examples)} of {len(prompts)} solutions are longer than warmup.max_tokens and left out")
    if not examples:
        raise InputError(
            f"{settings.data.path}: warmup.max_tokens: {settings.max_tokens} is shorter than every example; raise it"
        )
    epoch, order = 0, np.zeros(0, dtype=np.int64)
    while True:
        while len(order) < settings.sequences:
            order = np.concatenate([order, np.random.default_rng([seed, epoch]).permutation(len(examples))])
            epoch += 1
        yield tuple(examples[index] for index in order[: settings.sequences])
        order = order[settings.sequences :]


if __name__ == "__main__":
    launch.run(main)
