"""AdamW whose two moments take a byte a value each, and whose updates of bf16 weights are rounded stochastically.

    moment    table[code] · scale      code: uint8; scale: fp32, the largest absolute value of a block
    block     256 values of one row, or 128 or 64 where 256 does not divide a row
    table     256 numbers from -1 (m) or 0 (v) to 1 in seven decades, the finer the larger (`table`)
    step      decode, AdamW in fp32, code anew; the weight moves by the moments before they are coded
    rounding  bf16 keeps a float's upper 16 bits; a random number below 2^16 is added before they are cut off, so that the mean of
              what is stored is what was computed. Rounded to the nearest, steps below 2^-9 of a weight would all be lost.

After Dettmers et al., 8-bit Optimizers via Block-wise Quantization (arXiv 2110.02861), and torchao's AdamW8bit, whose tables are
the same. Different here:

- Codes and scales are tensors of their own, sharded by rows like their weight, and no block crosses a row: a checkpoint reads on
  any number of ranks, and which weights are coded does not depend on how they are sharded.
- Vectors, and matrices whose rows 64 does not divide, keep fp32 moments, whatever the weight's dtype.
- v is never coded as 0. Where a gradient is then 0 and m is not, a step would be m / eps.
- The random numbers come from (seed, step, shard): copies of the model (HSDP) round alike, and a resumed run as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BLOCKS = (256, 128, 64)
DECADES = 7
PIECE = {"cuda": 1 << 23, "cpu": 1 << 20}
"""Values updated at once: what a step takes beside weights, gradients and moments is bounded by them."""
WORKSPACE = 16
"""Bytes that a value of a piece takes in the compiled update: both moments in fp32, and both over their scales."""


class AdamW8bit(torch.optim.Optimizer):
    """seed: of the stochastic rounding, the same on every rank. Its moments exist from the start.

    On a GPU the update of a piece is compiled, once for each block size and pair of dtypes.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter in every:
            self.state[parameter] = new_state(parameter.detach())
        self._tables = tables(every[0].device)
        self.piece = PIECE[every[0].device.type]
        self.update_coded, self.update_plain = update_coded, update_plain
        if every[0].is_cuda:
            self.update_coded, self.update_plain = torch.compile(update_coded), torch.compile(update_plain)

    @torch.no_grad()
    def step(self) -> None:
        generator: torch.Generator | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                step = int(state["step"])
                if generator is None:
                    seed = np.random.SeedSequence([self._seed, step, *shard_of(parameter)]).generate_state(1)[0]
                    generator = torch.Generator(parameter.device).manual_seed(int(seed))
                self._update(parameter, state, coefficients(group, step).to(parameter.device), generator)

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], step_6: Tensor, generator: torch.Generator) -> None:
        """Piece by piece; on this rank's rows."""
        block = block_of(parameter.shape)
        update, names = (self.update_coded, CODED) if block else (self.update_plain, PLAIN)
        held = [local(state[name]).view(-1, 1 if name in SCALES else block or 1) for name in names]
        weight, gradient = (local(tensor).view(-1, block or 1) for tensor in (parameter.detach(), parameter.grad))
        rows = self.piece // (block or 1)
        for start in range(0, len(weight), rows):
            piece = [tensor[start : start + rows] for tensor in (weight, gradient, *held)]
            noise = None
            if parameter.dtype == torch.bfloat16:
                noise = torch.randint(1 << 16, piece[0].shape, generator=generator, dtype=torch.int32, device=weight.device)
                piece.append(noise)
            for tensor in piece:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            update(*piece[: 2 + len(names)], step_6, noise, *(self._tables if block else ()))


PLAIN = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
CODED = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


def update_plain(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step_6: Tensor, noise: Tensor | None) -> None:
    """In place; fp32 moments."""
    new_weight, new_m, new_v = adamw(weight, gradient, m, v, step_6)
    weight.copy_(rounded(new_weight, noise))
    m.copy_(new_m)
    v.copy_(new_v)


def update_coded(
    weight: Tensor, gradient: Tensor, m: Tensor, m_scale: Tensor, v: Tensor, v_scale: Tensor, step_6: Tensor,
    noise: Tensor | None, m_table: Tensor, m_middles: Tensor, v_table: Tensor, v_middles: Tensor,
) -> None:  # fmt: skip
    """In place; each row is a block."""
    new_weight, new_m, new_v = adamw(weight, gradient, decode(m, m_scale, m_table), decode(v, v_scale, v_table), step_6)
    weight.copy_(rounded(new_weight, noise))
    codes, scale = encode(new_m, m_middles)
    m.copy_(codes)
    m_scale.copy_(scale)
    codes, scale = encode(new_v, v_middles)
    v.copy_(codes.clamp(min=1))
    v_scale.copy_(scale)


def adamw(weight: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step_6: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, m, v) after a step, fp32. step_6: `coefficients`."""
    decay, m_share, v_share, rate, correction, eps = step_6.unbind()
    gradient = gradient.float()
    m = m + (gradient - m) * m_share
    v = v + (gradient * gradient - v) * v_share
    return weight.float() * decay - rate * m / (v.sqrt() / correction + eps), m, v


def coefficients(group: dict[str, Any], step: int) -> Tensor:
    """What `adamw` takes beside tensors, fp32 [6], as a tensor so that none is compiled in. step: from 1."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    rate, correction = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return torch.tensor([1 - lr * group["weight_decay"], 1 - beta1, 1 - beta2, rate, correction, group["eps"]])


def rounded(value: Tensor, noise: Tensor | None) -> Tensor:
    """fp32 as bf16, up or down so that the mean is exact; noise: int32, uniform in [0, 2^16). None: as it is."""
    if noise is None:
        return value
    return ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def encode(value: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales [blocks, 1]) of [blocks, block]: the table's number nearest to each value over its block's scale."""
    scale = value.abs().amax(-1, keepdim=True)
    share = value / scale.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.bucketize(share, middles, out_int32=True).to(torch.uint8), scale


def decode(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    return table[codes.int()] * scale


def tables(device: torch.device) -> list[Tensor]:
    """m's 256 numbers and the 255 middles between neighbours; v's."""
    both = [torch.tensor(table(signed), dtype=torch.float32, device=device) for signed in (True, False)]
    return [each for numbers in both for each in (numbers, (numbers[1:] + numbers[:-1]) / 2)]


def table(signed: bool) -> tuple[float, ...]:
    """Ascending: 0, 1, and in the decade up to 10^-i (i from 6 to 0) the middles of 2^(6-i) equal parts of its upper nine tenths,
    twice as many where there are no negative ones."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2**decade * (1 if signed else 2)
        middles = [(0.1 + 0.9 * (part + 0.5) / parts) * 10.0 ** (decade - DECADES + 1) for part in range(parts)]
        found += middles + [-middle for middle in middles if signed]
    return tuple(sorted(found))


def block_of(shape: torch.Size) -> int | None:
    """Values that share a scale, of a weight; None: its moments stay in fp32."""
    row = math.prod(shape[1:])
    return next((block for block in BLOCKS if len(shape) > 1 and row % block == 0), None)


def new_state(weight: Tensor) -> dict[str, Tensor]:
    """Moments of 0 and the count of steps."""
    block = block_of(weight.shape)
    state = {"step": torch.zeros(())}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.zeros_like(weight, dtype=torch.uint8 if block else torch.float32)
        if block:
            firsts = weight.flatten(1)[:, ::block]
            state[f"{name}_scale"] = torch.zeros_like(firsts, dtype=torch.float32, memory_format=torch.contiguous_format)
    return state


def shard_of(parameter: Tensor) -> list[int]:
    """Which of its shards this rank holds; the same on ranks that hold copies."""
    if not isinstance(parameter, DTensor):
        return [0]
    places = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
    return [coordinate for coordinate, placement in places if not placement.is_replicate()]


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
