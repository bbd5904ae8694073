"""Each peer that is installed, on a tiny case, against fp64: the adapter calls it rightly and says rightly what it computes.

Triton kernels of peers run on a CPU under TRITON_INTERPRET=1; without that and without a GPU they are skipped, with the reason.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.cases import OPERATIONS, Case
from benchmarks.kernels.contender import Gradient
from benchmarks.kernels.inputs import make_inputs
from benchmarks.kernels.peers import peers
from benchmarks.kernels.truth import Truth, wrong

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    Case(operation, mode, 32, 1024, 128 if "linear" in operation else 0, dtype)
    for operation in ("logprob_entropy", "policy_loss_from_logits", "linear_logprob_entropy", "linear_policy_loss")
    for mode in OPERATIONS[operation]
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("peer", peers(), ids=lambda peer: peer.name)
def test_peer_computes_what_its_adapter_says(peer):
    offered = [case for case in CASES if peer.offers(case)]
    assert offered
    for case in offered:
        reason = peer.unavailable(case, DEVICE)
        if reason is not None:
            pytest.skip(reason)
        inputs = make_inputs(case, DEVICE)
        prepared = peer.prepare(case, inputs)
        gradient = peer.gradient(case) if case.with_gradient else Gradient.NONE
        for _ in range(2):  # a second call must find its inputs as the first did
            if prepared.before is not None:
                prepared.before()
            errors = Truth(inputs).errors(prepared.run(), gradient)
            assert errors, case.name
            assert wrong(errors, case.dtype) is None, (case.name, errors)
