"""All contenders, ours first."""

from __future__ import annotations

import torch

from benchmarks.kernels import ours, plain
from benchmarks.kernels.contender import Contender
from benchmarks.kernels.peers import peers


def contenders(device: torch.device) -> list[Contender]:
    return [*ours.contenders(device), *plain.contenders(), *peers()]


def by_name(name: str, device: torch.device) -> Contender:
    """Raises KeyError for a name that nobody here has."""
    return {contender.name: contender for contender in contenders(device)}[name]
