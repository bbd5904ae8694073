"""Other people's kernels as contenders, one class a kernel. None of them is needed to run.

Versions: requirements/peers.txt. A peer that is missing, or that fails, is listed with its reason.
"""

from __future__ import annotations

from benchmarks.kernels.contender import Contender
from benchmarks.kernels.peers.liger import LigerGrpoLinear, LigerGrpoLogits, LigerHead, LigerHeadFallback
from benchmarks.kernels.peers.others import CutCrossEntropy, CutCrossEntropyWhole, Quack, Verl
from benchmarks.kernels.peers.trl import TrlChunked, TrlLogits


def peers() -> list[Contender]:
    return [
        TrlLogits(),
        TrlChunked(),
        LigerGrpoLogits(),
        LigerGrpoLinear(),
        LigerHead(),
        LigerHeadFallback(),
        Verl(),
        CutCrossEntropy(),
        CutCrossEntropyWhole(),
        Quack(),
    ]
