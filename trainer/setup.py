"""Builds what a run consists of, on each rank, from its configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.backend import loss_path
from rollout.engine import Engine
from rollout.errors import EngineError
from rollout.ranks import Ranks
from rollout.reward.correctness import Correctness
from rollout.reward.judge.verifier import JudgeVerifier
from rollout.reward.pipeline import Reward
from rollout.reward.repetition import RepetitionLimits
from rollout.reward.rule import RuleVerifier, batch_time
from rollout.reward.tokens import Reader, reader_of
from rollout.sampler import Sampler
from rollout.weights.sync import WeightSync
from trainer.actor import Actor
from trainer.config import ModelConfig, RunConfig
from trainer.distributed import unwatched_seconds
from trainer.engines import build_engine, build_probe, engine_hosts
from trainer.lookahead import quiet_beside
from trainer.optimizer import build_optimizer
from trainer.policy import Policy, PolicyWeights, build_policy, policy_options
from trainer.preflight import judge_settings
from trainer.probe import policy_scorer
from trainer.text import end_tokens, load_tokenizer, prompt_encoder
from trainer.watch import Watch


@dataclass(slots=True)
class Parts:
    """The pieces of a run on one rank."""

    actor: Actor
    engine: Engine
    sync: WeightSync
    sampler: Sampler
    reader: Reader
    correctness: Correctness
    judge: JudgeVerifier | None
    device: torch.device
    precision: torch.dtype
    """In which policy and engine compute."""

    def paths(self) -> dict[str, str]:
        """Which implementation of each exchangeable part runs; goes into every metrics row."""
        return {
            "path/loss": loss_path(self.device.type),
            "path/attention": self.actor.policy.attention.kernel,
            "path/engine": self.engine.name,
        }

    def judged(self) -> dict[str, int]:
        """What this rank's judge was asked since the last call, and what came of it; nothing without one."""
        return {f"judge/{name}": count for name, count in asdict(self.judge.measured()).items()} if self.judge else {}

    def close(self) -> None:
        self.correctness.close()
        self.engine.close()


def build_parts(config: RunConfig, ranks: Ranks, mesh: DeviceMesh, device: torch.device, console: Any, watch: Watch) -> Parts:
    """Everything but data. The verifier's processes and the engine's start first, beside the model's loading; on a GPU that they
    share the engine's before it."""
    hosts = engine_hosts(config, ranks)
    judge = build_judge(config, ranks, console.note)
    rule = RuleVerifier(
        config.reward.rule, config.reward.workers, config.reward.timeout_seconds, batch_seconds=config.reward.batch_seconds
    )
    correctness = Correctness(rule, judge)
    tokenizer = load_tokenizer(config.model.path)
    end_token_ids = end_tokens(config.model.path, tokenizer)
    precision = precision_of(config.model, device)
    engine = build_engine(config, ranks, device, precision, end_token_ids, console.note)
    if device.type == "cuda" and config.engine.kind == "vllm":
        wait_for_engines(engine, ranks)
    reader = reader_of(tokenizer)
    reward = Reward(
        correctness,
        tokenizer,
        prefill=config.template.prefill,
        end_token_ids=end_token_ids,
        repetition=RepetitionLimits(**config.reward.repetition.model_dump()),
        reader=reader,
    )
    actor = build_actor(config, ranks, mesh, device)
    sync = WeightSync(
        engine,
        PolicyWeights(actor.policy),
        ranks,
        score=policy_scorer(actor.policy, device),
        probe=build_probe(config, precision),
        seconds=config.engine.sync_seconds,
        note=console.note,
        asks=ranks.rank in hosts,
    )
    encode = prompt_encoder(tokenizer, config.template)
    if config.engine.one_step_off:
        # Its thread must not meet the loop's in a collective, and cannot push weights while the loop changes them.
        meeting, recover = ranks.another(unwatched_seconds(config.parallel.timeout_seconds), watch.ahead), None
    else:
        meeting, recover = ranks, sync.recover
    sampler = Sampler(
        engine,
        reward,
        encode,
        meeting,
        quiet_beside(console.phase),
        config.seed,
        recover,
        overlap=config.engine.overlap,
        hosts=hosts,
        stopping=watch.stopping,
        judge_seconds=lambda outputs: judge_seconds(config, outputs),
    )
    return Parts(actor, engine, sync, sampler, reader, correctness, judge, device, precision)


def wait_for_engines(engine: Engine, ranks: Ranks) -> None:
    """While it starts, a vLLM takes for its own whatever else fills its GPU, and makes its cache smaller by it; so no rank loads
    anything meanwhile. One that does not start is started anew by the first push. A collective."""
    with contextlib.suppress(EngineError):
        engine.ready()
    ranks.all_gather(None)


def judge_seconds(config: RunConfig, outputs: int) -> float:
    """For all verdicts on so many outputs at once: the verifiers' own deadlines, one after the other, and
    parallel.timeout_seconds for what has none (their start, the filter)."""
    reward = config.reward
    rule = reward.batch_seconds or batch_time(outputs, reward.workers, reward.timeout_seconds)
    return rule + (reward.judge.deadline_seconds if reward.judge else 0.0) + config.parallel.timeout_seconds


def build_judge(config: RunConfig, ranks: Ranks, note: Callable[[str], None]) -> JudgeVerifier | None:
    """This rank's, with its own file of decisions and its share of the budget."""
    if config.reward.judge is None:
        return None
    store = config.run / "judge" / f"rank-{ranks.rank}.sqlite"
    return JudgeVerifier(judge_settings(config.reward.judge), store=store, rank=ranks.rank, ranks=ranks.size, note=note)


def build_actor(config: RunConfig, ranks: Ranks, mesh: DeviceMesh, device: torch.device) -> Actor:
    """The sharded policy with its optimizer, and the frozen reference where a stage has a KL term."""
    options = policy_options(config, precision_of(config.model, device), device)
    reference: Policy | None = None
    if any(stage.objective.kl_coefficient > 0 for stage in config.stages):
        reference = build_policy(config.model.reference or config.model.path, mesh, replace(options, trainable=False))
    policy = build_policy(config.model.path, mesh, options)
    optimizer = build_optimizer(policy, config.stages[0].actor, config.optimizer, seed=config.seed)
    return Actor(
        policy, config.stages[0].actor, rank=ranks.rank, ranks=ranks.size, device=device, reference=reference, optimizer=optimizer
    )


def precision_of(model: ModelConfig, device: torch.device) -> torch.dtype:
    """Compute dtype of the policy and the engine."""
    if model.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, model.precision)
