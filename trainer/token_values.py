"""What scoring gave each response token, from the ranks that scored it to rank 0.

A sequence goes by a digest of its tokens: a mini-batch may have been scored in parts, in any order, by any rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # they bring torch with them
    from torch import Tensor

    from rollout.ranks import Ranks
    from trainer.actor import ScoredMiniBatch
    from trainer.batch import MicroBatch

Shares = list[tuple[bytes, np.ndarray]]
"""A rank's values of each sequence, in the order of scoring; where ranks share micro-batches, of its part of each."""


def gathered(
    ranks: Ranks,
    together: int,
    batches: Sequence[ScoredMiniBatch],
    values: Callable[[MicroBatch], Tensor],
    wanted: Container[bytes] | None = None,
) -> dict[bytes, np.ndarray]:
    """`key_of` a sequence → float32 [n], what `values` [R] says of its response; on rank 0, elsewhere {}. A collective.

    together: ranks that share each micro-batch's tokens. wanted: keys; None: of all sequences.
    """
    parts = ranks.gather([share for batch in batches for share in shares(batch, values, wanted)])
    return joined(parts, together) if ranks.first else {}


def shares(batch: ScoredMiniBatch, values: Callable[[MicroBatch], Tensor], wanted: Container[bytes] | None) -> Shares:
    """This rank's."""
    found: Shares = []
    for micro, part in zip(batch.micro, batch.parts, strict=True):
        keys = [key_of(part.sequences[index].prompt, part.sequences[index].response) for index in micro.indices]
        if any(wanted is None or key in wanted for key in keys):
            values_R = values(micro).float().cpu().numpy()
            pieces = np.split(values_R, np.cumsum(micro.counts)[:-1])
            found += [(key, piece) for key, piece in zip(keys, pieces, strict=True) if wanted is None or key in wanted]
    return found


def joined(ranks: Sequence[Shares], together: int) -> dict[bytes, np.ndarray]:
    """Two equal sequences have the same values but for the order of sums: either's are taken."""
    found: dict[bytes, np.ndarray] = {}
    for first in range(0, len(ranks), together):
        for parts in zip(*ranks[first : first + together], strict=True):
            key, _ = parts[0]
            found[key] = np.concatenate([values for _, values in parts])
    return found


def key_of(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """Of a prompt's and a response's token ids."""
    digest = hashlib.sha256(len(prompt).to_bytes(4, "little"))
    for tokens in (prompt, response):
        digest.update(np.ascontiguousarray(tokens, dtype=np.int32).tobytes())
    return digest.digest()
