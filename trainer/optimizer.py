"""The optimizer of a policy, as a configuration names it. Bytes a parameter on the GPUs that share a copy of the model:

                              weights   gradients   moments
    adamw                     4         4           8
    adamw, offload            4         4           8 on the host, and in a step twice those of the largest weight
    adamw8bit                 4         4           2.03
    adamw8bit, bf16 weights   2         4, or 2     2.03

Gradients of bf16 weights: FSDP2 reduces them in fp32, then rounds them to the weight's dtype and would add micro-batches in it.
`keep_gradients_in_fp32` adds them in fp32, each rounded to bf16 once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trainer.adamw8bit import AdamW8bit
from trainer.adamw_offloaded import OffloadedAdamW
from trainer.config import ActorConfig, OptimizerConfig

ADAMW = OptimizerConfig()
EPS = 1e-8


def build_optimizer(
    policy: nn.Module, actor: ActorConfig, options: OptimizerConfig = ADAMW, *, seed: int = 0, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Over a policy that has its memory. Its moments exist at once: what does not fit fails here, and a resumed run reads into
    them. seed: the run's. fused: one pass over memory in place of ten, with other roundings; None: on a GPU."""
    parameters = list(policy.parameters())
    if options.gradients == "float32":
        keep_gradients_in_fp32(parameters)
    settings = {"lr": actor.lr, "betas": actor.betas, "eps": EPS, "weight_decay": actor.weight_decay}
    if options.kind == "adamw8bit":
        return AdamW8bit(parameters, **settings, seed=seed)
    settings |= {"foreach": False, "fused": parameters[0].is_cuda if fused is None else fused}
    if options.offload:
        return OffloadedAdamW(parameters, **settings)
    optimizer = torch.optim.AdamW(parameters, **settings)
    make_moments(optimizer)
    return optimizer


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """As its first step would."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            weight = parameter.detach()
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=weight.device if group["fused"] else None),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }


def keep_gradients_in_fp32(parameters: Iterable[nn.Parameter]) -> None:
    """Of parameters of a lower precision, sharded ones too. In a backward FSDP2 adds to what is there, in its dtype."""
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = None  # any
            parameter.register_post_accumulate_grad_hook(_widen)


def _widen(parameter: nn.Parameter) -> None:
    if parameter.grad.dtype != torch.float32:
        parameter.grad = parameter.grad.float()
