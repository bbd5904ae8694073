"""TRL (huggingface/trl): its logits kernel and its chunked head. Both files are loaded by path: `import trl` wants datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.contender import Function, Outputs
from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.peers.base import HeadPeer, Peer
from benchmarks.kernels.peers.loading import load

VOCABULARY_CHUNK = 8192
"""As the trainer calls it."""


class TrlLogits(Peer):
    name = "TRL selective_log_softmax_and_entropy"
    operations = ("logprob_entropy",)
    package = distribution = "trl"

    def function(self, case: Case, inputs: Inputs) -> Function:  # noqa: ARG002
        run = load("trl", "kernels.logprob_entropy").selective_log_softmax_and_entropy
        return lambda logits: Outputs(*run(logits, inputs.labels_T, 1.0, None))


class TrlChunked(HeadPeer):
    name = "TRL ChunkedLogProbFunction"
    package = distribution = "trl"
    needs_cuda = False  # it has a torch twin for devices without Triton

    def head(self, case: Case, inputs: Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:  # noqa: ARG002
        # Only its backward asks for this, to gather a weight that DeepSpeed has sharded.
        stub = {"_peer_trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *_: contextlib.nullcontext()}}
        apply = load("trl", "kernels.chunked_logprob", stub).ChunkedLogProbFunction.apply

        def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            logprob, entropy, *_ = apply(hidden, weight, None, inputs.labels_T, 1.0, VOCABULARY_CHUNK, None, 1.0, ("entropy",))
            return logprob, entropy

        return run
