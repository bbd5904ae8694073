"""The policy: a Hugging Face causal model whose output head computes the loss instead of logits, sharded with FSDP2.

`Policy.forward` runs the decoder over packed sequences and hands the hidden states that predict response tokens to `LossHead`.
The head is a module with the output weight as its parameter, so FSDP2 shards that weight like any other and gathers it whole for
just the time of the head's forward and backward. Tied weights stay with the embedding, in the root's group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from rollout import model_folder
from rollout.weights.source import TensorMeta
from trainer.attention import ALONE, Attention, attention_kernel
from trainer.attention import NAME as PACKED_ATTENTION
from trainer.batch import MicroBatch
from trainer.config import RunConfig
from trainer.distributed import unwatched_seconds
from trainer.layers import KEEP_ALL, LayerOptions, layer_options, prepare_layers
from trainer.loading import empty_causal_lm, load_shards
from trainer.sequence_parallel import check_heads, sequence_group

HeadFunction = Callable[[Tensor, Tensor], Any]
"""(hidden_RD, weight_VD) → whatever the caller wants computed while the weight is whole."""


class LossHead(nn.Module):
    """Owns the output weight [V, D]; computes `function(hidden_RD, weight)`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_RD: Tensor, function: HeadFunction) -> Any:
        return function(hidden_RD, self.weight)


class Policy(nn.Module):
    """`causal_lm` with its lm_head replaced by a `LossHead`. Parameter names are the model's own behind 'causal_lm.'.

    attention: how the micro-batches it is fed are to be laid out (`trainer.batch.collate`).
    """

    def __init__(self, causal_lm: nn.Module, attention: Attention = ALONE) -> None:
        super().__init__()
        self.attention = attention
        self.tied = causal_lm.lm_head.weight is causal_lm.model.embed_tokens.weight
        causal_lm.lm_head = LossHead(causal_lm.lm_head.weight)
        self.causal_lm = causal_lm

    def forward(self, batch: MicroBatch, function: HeadFunction) -> Any:
        hidden_TD = self.causal_lm.model(
            input_ids=batch.input_ids_T.unsqueeze(0),
            position_ids=batch.position_ids_T.unsqueeze(0),
            layout=batch.layout,
            use_cache=False,
        ).last_hidden_state.squeeze(0)
        return self.causal_lm.lm_head(hidden_TD[batch.rows_R], function)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """(the model's own parameter name, whole detached master weight), one at a time.

        A collective: every rank iterates to the end.
        """
        if isinstance(self, FSDPModule):
            self.reshard()  # after a forward without backward the root still holds its weights in the compute dtype
        for name, parameter in self.causal_lm.named_parameters():
            yield name, parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()


class PolicyWeights:
    """A policy as a `rollout.weights.source.WeightSource`."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def metadata(self) -> list[TensorMeta]:
        parameters = self._policy.causal_lm.named_parameters()
        return [TensorMeta(name, parameter.dtype, tuple(parameter.shape)) for name, parameter in parameters]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._policy.whole_weights()


def load_causal_lm(path: Path, dtype: torch.dtype, attention: str = PACKED_ATTENTION) -> nn.Module:
    """See `rollout.model_folder.load_causal_lm`; with the trainer's attention over packed sequences."""
    return model_folder.load_causal_lm(path, dtype, attention)


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """precision: in which is computed; gradients are reduced in fp32. weights: dtype of the master weights."""

    precision: torch.dtype
    weights: torch.dtype = torch.float32
    layers: LayerOptions = KEEP_ALL
    attention: Attention = ALONE
    trainable: bool = True


def policy_options(config: RunConfig, precision: torch.dtype, device: torch.device) -> PolicyOptions:
    """How a run's policy computes. A collective where ranks share sequences. Raises InputError where an attention kernel that is
    asked for is not there, or the ranks cannot be grouped."""
    model = config.model
    kernel = attention_kernel(model.attention, device, precision)
    group = sequence_group(config.parallel.sequence_ranks, unwatched_seconds(config.parallel.timeout_seconds))
    return PolicyOptions(precision, getattr(torch, model.weights), layer_options(config), Attention(kernel, group))


def build_policy(path: Path, mesh: DeviceMesh, options: PolicyOptions) -> Policy:
    """A policy in shards, loaded into them (`trainer.loading`)."""
    policy = empty_policy(path, mesh, options)
    load_shards(policy, path, mesh_device(mesh))
    return policy


def empty_policy(path: Path, mesh: DeviceMesh, options: PolicyOptions) -> Policy:
    """A policy in shards without memory, of a folder's config.json."""
    return sharded(empty_causal_lm(path, options.weights), mesh, options)


def sharded(causal_lm: nn.Module, mesh: DeviceMesh, options: PolicyOptions) -> Policy:
    """A transformers model, on the meta device or with weights, as a policy in shards.

    Each decoder layer is one FSDP unit; an untied head is its own; embedding, last norm and a tied head form the root. Raises
    InputError where ranks cannot share its heads.
    """
    if options.attention.group is not None:
        check_heads(options.attention.group.size, causal_lm.config.num_attention_heads, causal_lm.config.num_key_value_heads)
    if options.trainable:
        prepare_layers(causal_lm, options.layers, options.precision.itemsize)
    policy = Policy(causal_lm, options.attention).requires_grad_(options.trainable)
    policy.train(options.trainable)
    return shard(policy, mesh, options.precision)


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """This rank's."""
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device(mesh.device_type)


def shard(policy: Policy, mesh: DeviceMesh, precision: torch.dtype) -> Policy:
    """`fully_shard` per layer. Inputs are not cast: the loss's own inputs (old log-probabilities, weights) must stay fp32."""
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    for layer in policy.causal_lm.model.layers:
        fully_shard(layer, **options)
    if not policy.tied:
        fully_shard(policy.causal_lm.lm_head, **options)
    return fully_shard(policy, **options)
