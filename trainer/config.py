"""One YAML names a run. What may stand in it, with defaults, units and the recipe's source; read and checked by `config_file.py`.

The sections `data`, `sampling`, `batch`, `objective`, `recovery` and `actor` at the top level are defaults for every stage; a
stage overrides single keys of them. After reading, each stage holds its sections whole. Sections `engine`, `reward`,
`checkpoint`, `samples`, and `guards`, `alarms`, `mismatch`: config_engine.py, config_reward.py, config_checkpoint.py,
config_samples.py, config_guards.py.
Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.advantage import ADVANTAGES
from trainer.config_checkpoint import CheckpointConfig
from trainer.config_engine import EngineConfig
from trainer.config_guards import AlarmsConfig, GuardsConfig, MismatchConfig
from trainer.config_reward import RewardConfig
from trainer.config_samples import SamplesConfig
from trainer.config_section import Fraction, Positive, Section


class ModelConfig(Section):
    path: Path
    """Hugging Face folder: config.json, *.safetensors, tokenizer with a chat template. Qwen2, Qwen3 or Llama."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; gradients are reduced in fp32 in any case. auto: bfloat16 on a GPU, float32 on CPU."""
    attention: Literal["auto", "flash", "varlen", "sdpa"] = "auto"
    """Of packed sequences (`trainer.attention`): flash-attn, torch.nn.attention.varlen, or SDPA over padded rows. auto: the
    first of them that is there, on a GPU in bfloat16, else sdpa."""
    gradient_checkpointing: bool = False
    """Each layer keeps its input alone for the backward and runs again then."""
    saved_gib: float = Field(default=0.0, ge=0)
    """gradient_checkpointing: memory of one rank for results that are dear to compute again: of attention first, then of matrix
    multiplications, as many layers as it holds (`trainer.layers`)."""
    offload_activations: bool = False
    """gradient_checkpointing: the layers' inputs wait for the backward in the host's memory."""
    compile: bool = False
    """torch.compile of each layer, attention itself apart."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Master weights, which the optimizer changes. bfloat16: half the memory, each update rounded stochastically; with
    optimizer.kind adamw8bit."""
    reference: Path | None = None
    """Reference policy of the KL term; None: `path` itself. Loaded only where objective.kl_coefficient > 0."""

    @model_validator(mode="after")
    def _possible(self) -> ModelConfig:
        if not self.gradient_checkpointing and (self.saved_gib or self.offload_activations):
            raise ValueError("saved_gib and offload_activations need gradient_checkpointing: true (else all is kept as it is)")
        if self.compile and self.saved_gib:
            raise ValueError("compile and saved_gib exclude each other: what a compiled layer computes cannot be kept singly")
        return self


class TemplateConfig(Section):
    system: str | None = None
    """System prompt; None: the R1 system prompt (`rollout.template.R1_SYSTEM`); "" : none."""
    prefill: str = "<think>\n"
    """Opens the response; it stands in the prompt and is judged with the response."""


class PromptsFile(Section):
    path: Path
    columns: dict[str, str] = Field(default_factory=dict)
    """Logical field (id, question, answer, solution, source, metadata) → the file's column."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer, searched in the answer column (GSM8K: '####\\s*(.+)$')."""


class EvaluationSet(PromptsFile):
    name: str
    limit: Positive | None = None
    """Use the first so many prompts of the file; None: all."""


class DataConfig(Section):
    train: PromptsFile | None = None
    max_prompt_tokens: Positive = 1024


class SamplingConfig(Section):
    temperature: float = Field(default=1.0, gt=0)
    """Also divides the logits in every log-probability of the loss. No top-p here: the loss must see what was sampled from."""


class BatchConfig(Section):
    """N groups of G outputs a step. The paper says 256 samples a batch and not whether outputs or questions are meant."""

    groups: Positive = 256
    """N."""
    group_size: int = Field(default=16, ge=2)
    """G."""
    mini_batches: Positive = 1
    """Optimizer steps a batch; divides N."""
    dynamic: bool = False
    """Keep only groups with 0 < right < G and sample until there are N (DAPO)."""
    prompts_per_round: Positive | None = None
    """Questions a sampling round draws; None: N. The paper is silent."""
    abort_surplus: bool = False
    """Stop decoding as soon as N groups are legitimate; what still decodes is dropped and counted as aborted. Faster, but no
    longer Algorithm 1: what is dropped are the longest outputs, so the batch leans to short ones. Needs an engine that
    streams."""
    max_rounds: Positive = 64
    """A step that has not found N groups after so many rounds ends the run, saying so."""


class ObjectiveConfig(Section):
    """The defaults are GRPO; the recipe's stages 2 and 3 set loss_aggregation: token_sum, advantage: pshw and clip_high."""

    loss_aggregation: Literal["response_mean", "token_sum"] = "response_mean"
    """response_mean: mean over responses of each one's mean over tokens (GRPO). token_sum: sum over tokens / constant (DAPO)."""
    divisor: float | None = Field(default=None, gt=0)
    """token_sum's constant for a mini-batch; None: its number of responses × response limit, so never the batch's own lengths."""
    advantage: Literal[tuple(ADVANTAGES)] = "grpo"
    """`trainer.advantage` has the formulas."""
    std_correction: Literal[0, 1] = 1
    """grpo: divisor of the variance is G minus this. The paper is silent; 1 is what other trainers compute."""
    pshw_alpha: float = -0.256
    pshw_base: float = 1.256
    clip_low: Fraction = 0.2
    clip_high: float = Field(default=0.2, gt=0)
    """The paper does not give its clips; DAPO's own are 0.2 and 0.28."""
    entropy_target: float | None = Field(default=None, ge=0)
    """TER's target for the mean token entropy, nats (paper: 0.55 in stage 1). None: no TER."""
    entropy_coefficient: float = Field(default=0.001, ge=0)
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy ‖ reference). The paper does not mention one."""
    tis_cap: float | None = Field(default=None, gt=0)
    """Truncated importance weights: each token's policy term times min(π_trainer / π_sampler, this), recovered responses too.
    None: no weights; the paper used none."""


class RecoveryConfig(Section):
    """Recent Sample Recovery: the surplus of a step's legitimate groups opens the next step's batch."""

    enabled: bool = False
    capacity: Positive | None = None
    """At most so many groups are kept (the first ones); None: all. The paper is silent."""
    max_age: Positive | None = 1
    """Steps for which a group may wait. 1: the recipe's, for the next step only. None: until it finds a place, so that the buffer
    grows without bound where rounds bring more than N."""


class ActorConfig(Section):
    lr: float = Field(default=1e-6, gt=0)
    """AdamW. The paper is silent on the optimizer."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps, counted over the whole run, in which the rate rises linearly."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    tokens_per_micro_batch: Positive = 16384
    """Token budget of a packed micro-batch on one rank, prompts included."""
    micro_batches: Positive | None = None
    """At least so many micro-batches a mini-batch on each rank; None: as many as the budget asks."""


class StageConfig(Section):
    name: str
    steps: Positive
    context: Positive
    """Tokens of prompt and response together; the response may have context - data.max_prompt_tokens."""
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    actor: ActorConfig = ActorConfig()

    @property
    def response_limit(self) -> int:
        return self.context - self.data.max_prompt_tokens

    @model_validator(mode="after")
    def _possible(self) -> StageConfig:
        limit, batch = self.data.max_prompt_tokens, self.batch
        if self.data.train is None:
            raise ValueError("data.train is missing: a stage needs prompts; set data.train.path for the run or for this stage")
        if self.context <= limit:
            raise ValueError(
                f"context {self.context} leaves no room beside data.max_prompt_tokens {limit}: raise context above it"
            )
        if batch.groups % batch.mini_batches:
            raise ValueError(f"batch.groups {batch.groups} is not divisible by batch.mini_batches {batch.mini_batches}")
        if batch.abort_surplus and not batch.dynamic:
            raise ValueError("batch.abort_surplus needs batch.dynamic: true (without it a step has no surplus)")
        if self.recovery.enabled and not batch.dynamic:
            raise ValueError("recovery.enabled needs batch.dynamic: true (without it a step has no surplus to recover)")
        return self


class EvaluationConfig(Section):
    sets: tuple[EvaluationSet, ...] = ()
    every: Positive | None = None
    """Steps between evaluations; None: only before the first and after the last step."""
    k: Positive = 4
    """Sampled responses a question; pass@1 is their mean correctness."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.7, gt=0, le=1)
    greedy: bool = False
    """The likeliest token each time, whatever temperature and top_p say; with k: 1."""
    max_new_tokens: Positive | None = None
    """None: the last stage's response limit."""


class ParallelConfig(Section):
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Deadline of a collective, and of whatever else has no shorter one of its own: a rank that gets nowhere for so long ends
    the run with a report (docs/operations.md). Longer than the deadlines of a vLLM, during which ranks wait for each other:
    engine.start_seconds, silence_seconds and sync_seconds."""
    shard_ranks: Positive | None = None
    """Ranks that share one copy of the model and its optimizer; neighbours, usually one server's. None: all of them. Fewer:
    every so many ranks hold a copy (HSDP), and only gradients travel between the servers."""
    sequence_ranks: Positive = 1
    """Ranks, neighbours on one host, that share each micro-batch's tokens (Ulysses, `trainer.sequence_parallel`): for contexts
    whose activations do not fit one GPU. A micro-batch then has so many times actor.tokens_per_micro_batch."""


class OptimizerConfig(Section):
    """AdamW; its rates stand in `actor`."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: both moments in 8 bits, a scale for 256 values (`trainer.adamw8bit`): 2.03 bytes a parameter instead of 8."""
    offload: bool = False
    """adamw: its moments stay in the host's memory and pass through the GPU one tensor at a time in each step. Same result."""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are kept and micro-batches added up. bfloat16, with model.weights bfloat16: 2 bytes a parameter instead
    of 4; of a micro-batch is then lost what is below 2^-9 of the sum."""

    @model_validator(mode="after")
    def _possible(self) -> OptimizerConfig:
        if self.offload and self.kind != "adamw":
            raise ValueError("offload is for kind adamw; the moments of adamw8bit are small: leave one of the two out")
        return self


class WarmupConfig(Section):
    """Supervised learning on worked solutions in the R1 form: `python -m trainer.warmup CONFIG` writes model.path from `base`."""

    base: Path
    data: PromptsFile
    strip: tuple[str, ...] = ()
    """Regular expressions removed from a solution before it becomes the thinking."""
    steps: Positive
    sequences: Positive = 32
    """Sequences an optimizer step."""
    lr: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    max_tokens: Positive = 1024
    """Longer examples are left out, and counted."""

    @model_validator(mode="after")
    def _possible(self) -> WarmupConfig:
        for pattern in self.strip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"strip: {pattern!r} is no regular expression ({error}); mend it") from None
        return self


class RunConfig(Section):
    run: Path
    """The run folder."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    model: ModelConfig
    template: TemplateConfig = TemplateConfig()
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mismatch: MismatchConfig = MismatchConfig()
    guards: GuardsConfig = GuardsConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    samples: SamplesConfig = SamplesConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warmup: WarmupConfig | None = None
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def evaluation_response_limit(self) -> int:
        return self.evaluation.max_new_tokens or self.stages[-1].response_limit

    @property
    def max_tokens(self) -> int:
        """Of prompt and response together, over the run and its evaluations."""
        prompt = max(stage.data.max_prompt_tokens for stage in self.stages)
        return max(*(stage.context for stage in self.stages), prompt + self.evaluation_response_limit)

    def stage_of(self, step: int) -> int:
        """Index of the stage that step belongs to. Steps count from 0 over the whole run."""
        for index, stage in enumerate(self.stages):
            if step < stage.steps:
                return index
            step -= stage.steps
        return len(self.stages) - 1

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        if self.model.weights == "bfloat16" and self.optimizer.kind != "adamw8bit":
            raise ValueError("model.weights bfloat16 needs optimizer.kind: adamw8bit, which rounds its updates stochastically")
        if self.checkpoint.keep_best and not self.evaluation.sets:
            raise ValueError("checkpoint.keep_best needs evaluation.sets, whose pass@1 decides which is the best")
        if self.optimizer.gradients == "bfloat16" and self.model.weights != "bfloat16":
            raise ValueError("optimizer.gradients bfloat16 needs model.weights: bfloat16; fp32 weights have fp32 gradients")
        ranks = self.parallel.sequence_ranks
        for index, stage in enumerate(self.stages):
            if (tokens := stage.actor.tokens_per_micro_batch * ranks) < stage.context:
                raise ValueError(
                    f"stages[{index}]: actor.tokens_per_micro_batch {stage.actor.tokens_per_micro_batch}"
                    + (f" on parallel.sequence_ranks {ranks}, so {tokens}," if ranks > 1 else "")
                    + f" is smaller than context {stage.context}: one sequence must fit; raise it"
                )
        self._check_deadlines()
        if self.engine.embedded and any(stage.batch.abort_surplus for stage in self.stages):
            raise ValueError("batch.abort_surplus needs an engine that streams: set engine.kind to vllm or vllm-server")
        for kind, names in (
            ("stages", [s.name for s in self.stages]),
            ("evaluation.sets", [s.name for s in self.evaluation.sets]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{kind}: two of the same name in {names}; give each its own")
        files: dict[Path, PromptsFile] = {}
        for file in (stage.data.train for stage in self.stages):
            if files.setdefault(file.path, file) != file:
                raise ValueError(
                    f"stages: {file.path} is read with different columns or answer_pattern in two stages, which share its order "
                    "and cursor; give them the same"
                )
        return self

    def _check_deadlines(self) -> None:
        if self.engine.embedded:
            return
        longest = max(("start_seconds", "silence_seconds", "sync_seconds"), key=lambda name: getattr(self.engine, name))
        if self.parallel.timeout_seconds <= (seconds := getattr(self.engine, longest)):
            raise ValueError(
                f"parallel.timeout_seconds {self.parallel.timeout_seconds:g} is not above engine.{longest} {seconds:g}: the "
                "other ranks, which wait meanwhile, would end the run first; raise the one or lower the other"
            )


STAGE_SECTIONS = ("data", "sampling", "batch", "objective", "recovery", "actor")
