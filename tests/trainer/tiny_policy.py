"""A policy small enough to train in a test, a step's batch for it, and the cases of test_rank_invariance.py.

As a script it is one rank of several: RANK and WORLD_SIZE in the environment, `tiny_policy.py RENDEZVOUS OUTPUT LAYOUT SHARDS` on
the command line. All cases run in one launch, because importing torch takes longer than any of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Qwen2Config, Qwen2ForCausalLM

from kernels import reference as definitions
from rollout.ranks import Ranks
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.actor import Actor
from trainer.attention import ALONE, Attention
from trainer.attention import NAME as PACKED_ATTENTION
from trainer.batch import MiniBatch, TokenSequence, mini_batches
from trainer.config import ActorConfig, BatchConfig, DataConfig, ObjectiveConfig, PromptsFile, SamplingConfig, StageConfig
from trainer.distributed import MESH_NAMES, mesh_shape
from trainer.layers import KEEP_ALL, LayerOptions
from trainer.policy import Policy, PolicyOptions, sharded
from trainer.sequence_parallel import sequence_group
from trainer.token_values import gathered

VOCABULARY = 61
"""A prime: no number of ranks divides it, so the shards are uneven."""


@dataclass(frozen=True)
class Case:
    """One way to train the same batch: what must not change the result, and what does (`kind`)."""

    kind: str
    micro_batches: int = 1
    layers: LayerOptions = KEEP_ALL
    sequence_ranks: int = 1
    layouts: tuple[str, ...] = ("1", "2", "4", "2x2")

    @property
    def name(self) -> str:
        mode = next(name for name, layers in LAYERS.items() if layers == self.layers)
        return f"{self.kind}-{self.micro_batches}-{mode}" + (f"-over {self.sequence_ranks}" if self.sequence_ranks > 1 else "")


LAYERS = {
    "all": KEEP_ALL,
    "checkpointed": LayerOptions(checkpointing=True),
    "one layer's matmuls": LayerOptions(checkpointing=True, saved_bytes=2 * 11200 + 57600, tokens=100),
    "matmuls": LayerOptions(checkpointing=True, saved_bytes=10**6, tokens=100),
    "offloaded": LayerOptions(checkpointing=True, offload=True),
}
"""Of 100 tokens a layer's attention keeps 11,200 bytes and its matrix multiplications 57,600."""
# Each target lies between the mean entropies of the first mini-batch's parts, and above those of the second mini-batch.
OBJECTIVES = {
    "untied": ObjectiveConfig(
        loss_aggregation="token_sum", divisor=50.0, advantage="pshw", clip_low=0.2, clip_high=0.28,
        entropy_target=2.52, entropy_coefficient=0.5,
    ),
    "tied": ObjectiveConfig(kl_coefficient=0.3, entropy_target=2.36, entropy_coefficient=0.2),
}  # fmt: skip
CASES = [
    *(Case(kind, micro) for kind in OBJECTIVES for micro in (1, 2, 5)),
    *(Case(kind, 12, layouts=("1",)) for kind in OBJECTIVES),  # one sequence at a time
    *(Case("untied", 2, layers, layouts=("1", "2")) for layers in LAYERS.values() if layers != KEEP_ALL),
    Case("untied", 1, sequence_ranks=2, layouts=("2", "2x2")),
    Case("tied", 2, sequence_ranks=2, layouts=("2", "4")),
    Case("untied", 2, sequence_ranks=4, layouts=("4",)),  # more than key-value heads
    Case("tied", 1, LAYERS["matmuls"], sequence_ranks=2, layouts=("2",)),
]


def causal_lm(*, tied: bool, attention: str = PACKED_ATTENTION) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.35, tie_word_embeddings=tied,
        attn_implementation=attention,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def reference_lm(*, tied: bool, attention: str = PACKED_ATTENTION) -> Qwen2ForCausalLM:
    model = causal_lm(tied=tied, attention=attention)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def stage(objective: ObjectiveConfig, *, micro: int = 1, mini: int = 2, temperature: float = 0.8, **actor) -> StageConfig:
    return StageConfig(
        name="tiny",
        steps=1,
        context=64,
        data=DataConfig(train=PromptsFile(path=Path("prompts.jsonl")), max_prompt_tokens=16),
        batch=BatchConfig(groups=4, group_size=3, mini_batches=mini),
        sampling=SamplingConfig(temperature=temperature),
        objective=objective,
        actor=ActorConfig(**({"lr": 1e-3, "micro_batches": micro} | actor)),
    )


def batches(config: StageConfig) -> list[MiniBatch]:
    """4 groups of 3 outputs, of 1 to 40 tokens. sampled_logprobs holds what `shift_old` adds to the old log-probabilities."""
    generator = np.random.default_rng(7)
    lengths = iter([3, 40, 11, 1, 17, 28, 9, 33, 2, 21, 5, 14])
    groups = []
    for rewards in ((1, 1, -1), (1, -1, -1), (-1, 1, -1), (1, -1, 1)):
        samples = []
        for _ in rewards:
            size = next(lengths)
            ids = generator.integers(VOCABULARY, size=size).astype(np.int32)
            samples.append(Sample(ids, generator.normal(0, 0.3, size).astype(np.float32), "stop", 0))
        verdicts = tuple(Verdict(reward == 1, "right" if reward == 1 else "wrong") for reward in rewards)
        prompt = generator.integers(VOCABULARY, size=int(generator.integers(2, 9))).astype(np.int32)
        groups.append(Group(Prompt("q", "?", "!"), prompt, tuple(samples), verdicts, 0))
    return mini_batches(groups, config, step=0)


@contextmanager
def one_rank() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def build_actor(
    mesh: DeviceMesh,
    config: StageConfig,
    *,
    tied: bool = False,
    precision: torch.dtype = torch.float32,
    layers: LayerOptions = KEEP_ALL,
    attention: Attention = ALONE,
) -> Actor:
    """An actor with its own random policy, always the same, and where there is a KL term one near it as its reference."""
    options = PolicyOptions(precision, layers=layers, attention=attention)
    policy, reference = sharded(causal_lm(tied=tied), mesh, options), None
    if config.objective.kl_coefficient > 0:
        reference = sharded(reference_lm(tied=tied), mesh, replace(options, trainable=False))
    rank, ranks = mesh.get_rank(), mesh.size()
    return Actor(policy, config.actor, rank=rank, ranks=ranks, device=torch.device("cpu"), reference=reference)


def shift_old(scored: list) -> None:
    """Moves the old log-probabilities, so that ratios lie on both sides of both clips though no step was taken since."""
    for batch in scored:
        for part in batch.micro:
            part.old_logprob_R = part.old_logprob_R + part.sampled_logprob_R


class Naive:
    """What a mini-batch's loss and gradients should be: fp64, one sequence at a time through transformers' own attention, whole
    logits, the definitions of `kernels.reference`, autograd."""

    def __init__(self, batch: MiniBatch, config: StageConfig, *, tied: bool, shifted: bool = True) -> None:
        model = causal_lm(tied=tied, attention="sdpa").double()
        reference = reference_lm(tied=tied, attention="sdpa").double()
        objective, temperature = config.objective, config.sampling.temperature
        scored = [self._score(model, sequence, temperature) for sequence in batch.sequences]
        self.entropies = [entropy for _, entropy in scored]
        """[n] of each response."""
        logprob, entropy = (torch.cat(parts) for parts in zip(*scored, strict=True))
        with torch.no_grad():
            reference_logprob = torch.cat([self._score(reference, sequence, temperature)[0] for sequence in batch.sequences])
        sizes = torch.tensor([len(sequence.response) for sequence in batch.sequences])
        shift = torch.cat([torch.from_numpy(sequence.sampled_logprobs) for sequence in batch.sequences])
        self.policy = definitions.clipped_policy_loss(
            logprob,
            logprob.detach() + shift.double() * shifted,
            torch.tensor([sequence.advantage for sequence in batch.sequences]).repeat_interleave(sizes),
            torch.tensor([sequence.weight for sequence in batch.sequences]).repeat_interleave(sizes),
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            ref_logprob_T=reference_logprob,
            kl_coefficient=objective.kl_coefficient,
        )
        self.mean_entropy = entropy.mean()
        self.supervised = -(logprob * torch.tensor([s.weight for s in batch.sequences]).repeat_interleave(sizes)).sum()
        self.reference_gap_T = (reference_logprob - logprob).detach()
        self._model = model

    @staticmethod
    def _score(model: Qwen2ForCausalLM, sequence: TokenSequence, temperature: float) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(np.concatenate([sequence.prompt, sequence.response])).long()
        logits = model(input_ids=ids.unsqueeze(0)).logits[0, len(sequence.prompt) - 1 : -1]
        return definitions.logprob_entropy(logits, torch.from_numpy(sequence.response), temperature)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*self._model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest over the parameters of |got - expected| / |expected|, in the norm of each."""
    assert got.keys() == expected.keys()
    return max(((got[name].double() - value).norm() / value.norm()).item() for name, value in expected.items())


def whole_gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.grad.full_tensor().clone() for name, parameter in policy.causal_lm.named_parameters()}


def whole_weights(policy: Policy) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in policy.whole_weights()}


def train(case: Case, mesh: DeviceMesh) -> list[dict]:
    """Two mini-batches of one batch. For each: its scores, sums, unclipped gradients, update, and the weights after it; on rank 0
    the entropies of each response."""
    config = stage(OBJECTIVES[case.kind], micro=case.micro_batches)
    attention = Attention(group=sequence_group(case.sequence_ranks, 120))
    actor = build_actor(mesh, config, tied=case.kind == "tied", layers=case.layers, attention=attention)
    scored = actor.score(batches(config), config)
    shift_old(scored)
    results = []
    ranks = Ranks(mesh.get_rank(), mesh.size())
    for batch in scored:
        found = gathered(ranks, case.sequence_ranks, [batch], lambda micro: micro.entropy_R)
        entropies = {key.hex(): torch.from_numpy(values) for key, values in found.items()}
        sums = actor._gradient_pass(batch, config, 1.0, lambda *_: None)
        gradients = whole_gradients(actor.policy)
        actor.optimizer.zero_grad()
        update = asdict(actor.update(batch, config))
        scores = {"mean": batch.mean_entropy, "mismatch_sum": batch.mismatch.gap_sum, "mismatch_max": batch.mismatch.largest}
        weights = whole_weights(actor.policy)
        result = {"scores": scores, "entropies": entropies, "sums": sums, "gradients": gradients}
        results.append(result | {"update": update, "weights": weights})
    return results


def main(rendezvous: str, output: str, layout: str, shards: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    shape = mesh_shape(ranks, int(shards))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=MESH_NAMES[-len(shape) :])
    results = {case: train(case, mesh) for case in CASES if layout in case.layouts}
    if rank == 0:
        torch.save({repr(case): result for case, result in results.items()}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
