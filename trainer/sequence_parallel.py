"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509): ranks share the tokens of a micro-batch, and in
attention its heads.

    rank r of s holds tokens r·T/s … (r+1)·T/s of T      everything but attention works on them alone
    all-to-all: all T tokens of heads r·h/s … (r+1)·h/s  attention is computed whole, as on one rank, of fewer heads
    all-to-all back

Nothing is approximated: a head's attention is the same computation on another rank. Key-value heads that are fewer than the ranks
are repeated, each for its own query heads. Each rank's loss is of its own tokens; the sum over ranks is the micro-batch's, and so
are the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from rollout.errors import InputError


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Neighbouring ranks that share micro-batches; this is number `rank` of `size`."""

    rank: int
    size: int
    group: dist.ProcessGroup

    def share(self, tokens: int) -> slice:
        """This rank's, of `tokens`, a multiple of `size`."""
        each = tokens // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def by_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[t, heads, d] of this rank's tokens → [t · size, heads / size, d]: all tokens of this rank's heads. One collective."""
        key, value = (self._repeated(heads) for heads in (key, value))
        sizes = [heads.shape[1] // self.size for heads in (query, key, value)]
        parts = [heads.unflatten(1, (self.size, -1)) for heads in (query, key, value)]  # [t, size, heads / size, d]
        whole = self._exchange(torch.cat(parts, dim=2).transpose(0, 1)).flatten(0, 1)
        return whole.split(sizes, dim=1)

    def by_tokens(self, attended: Tensor) -> Tensor:
        """[t · size, heads / size, d] → [t, heads, d]: the way back."""
        return self._exchange(attended.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1, 2)

    def _repeated(self, heads: Tensor) -> Tensor:
        times = max(1, self.size // heads.shape[1])
        return heads.repeat_interleave(times, dim=1) if times > 1 else heads

    def _exchange(self, tensor: Tensor) -> Tensor:
        """tensor[i] to rank i; what comes from rank j stands at [j]."""
        return all_to_all_single_autograd(tensor.contiguous(), None, None, self.group)


def sequence_group(size: int, timeout_seconds: float) -> SequenceGroup | None:
    """This rank's, None for size 1. A collective of all ranks. Raises InputError where size does not divide their number."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks % size:
        raise InputError(f"parallel.sequence_ranks: {size} does not divide the {ranks} ranks; set a divisor, or leave it out")
    if size == 1:
        return None
    own = None
    for start in range(0, ranks, size):  # every rank takes part in making every group
        group = dist.new_group(list(range(start, start + size)), timeout=timedelta(seconds=timeout_seconds))
        if start <= rank < start + size:
            own = SequenceGroup(rank - start, size, group)
    return own


def check_heads(size: int, heads: int, key_value_heads: int) -> None:
    """Raises InputError where a model's heads cannot be shared out among `size` ranks."""
    if heads % size or (key_value_heads % size and size % key_value_heads):
        raise InputError(
            f"parallel.sequence_ranks: {size} ranks cannot share {heads} heads with {key_value_heads} key-value heads; set a "
            "divisor of the heads that divides the key-value heads or is a multiple of them"
        )
