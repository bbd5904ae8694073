"""Counts the bytes that tensors hold while code runs, fake tensors or real ones: a dispatch mode over storages.

Every storage that an operation gives out is counted once, from its first appearance until it is freed; a storage resized in place
(FSDP gives its gathered weights memory and takes it away so) is counted at its new size. What an operation takes inside itself
and gives back is not seen; for the loss head, a custom operation whose inside is large, `trainer.planner.loss_head` says it.

What is not counted: rounding to an allocator's blocks and its fragments, memory of libraries, GEMM workspaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from trainer.planner.loss_head import workspace_bytes

WEIGHTS, OPTIMIZER, GRADIENTS = "weights", "optimizer", "gradients"
GATHERED, REDUCED, HEAD, ACTIVATIONS = "gathered units", "reduction buffers", "loss head", "activations"
KINDS = (WEIGHTS, OPTIMIZER, GRADIENTS, GATHERED, REDUCED, ACTIVATIONS, HEAD)
"""What a storage is counted as. activations: whatever is none of the others, temporaries and unsharded gradients included."""
HOST = "host"
"""What would be in the host's memory: in no sum and no peak."""

GATHERS = ("c10d::_allgather_base_", "_c10d_functional::all_gather_into_tensor", "fsdp::all_gather_copy_in")
"""Operations whose results are gathered weights."""
COPY_OUT = "fsdp::split_with_sizes_copy"
"""Writes a unit's gathered weights, each to its own memory."""
REDUCE_INPUT, REDUCE_SCATTER = "fsdp::chunk_cat", "c10d::_reduce_scatter_base_"
HEADS = {
    "keju::linear_logprob_entropy": lambda _: False,
    "keju::linear_logprob_entropy_backward": lambda _: True,
    "keju::linear_policy_loss": lambda arguments: arguments[12],
}
"""The loss head's operations, hidden_TD and weight_VD their first arguments → whether this call forms gradients."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes held at once, and what they were at that moment."""

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Held:
    nbytes: int
    kind: str
    reference: weakref.ref


class MemoryTracker(TorchDispatchMode):
    """device_type: where the code is meant to run, which decides how large the loss head's chunks are; None: the tensors' own
    device, whose head really runs."""

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self._held: dict[int, _Held] = {}
        self._default = ACTIVATIONS
        self._live = dict.fromkeys((*KINDS, HOST), 0)
        self._total = 0
        self._peak = Peak()
        self._fake_mode: Any = None
        self._paused = False

    @contextmanager
    def phase(self) -> Iterator[list[Peak]]:
        """Yields a list that holds, once the block is left, the peak within it."""
        self._peak = self._now()
        found: list[Peak] = []
        yield found
        found.append(self._peak)

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """New storages are of this kind."""
        before, self._default = self._default, kind
        try:
            yield
        finally:
            self._default = before

    @property
    def live(self) -> dict[str, int]:
        """Bytes held now, by kind."""
        return dict(self._live)

    def __enter__(self) -> MemoryTracker:
        self._fake_mode = active_fake_mode()
        self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._resized(storage)

        def propagate(propagator: ShardingPropagator, schema: Any) -> Any:
            self._paused, before = True, self._paused
            try:
                return self._propagate(propagator, schema)
            finally:
                self._paused = before

        torch.UntypedStorage.resize_ = resize_  # no operation: a dispatch mode does not see it
        # DTensor finds out the shapes of whole results on fake tensors, in the mode that is active: they are not held.
        self._propagate = ShardingPropagator._propagate_tensor_meta_non_cached
        ShardingPropagator._propagate_tensor_meta_non_cached = propagate
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first, which then runs operations on its shards
        kwargs = kwargs or {}
        name = func._schema.name
        if self._paused or name.startswith("prim::"):
            return func(*args, **kwargs)
        if self._fake_mode is not None and name == "aten::_local_scalar_dense":
            return {torch.bool: True}.get(args[0].dtype, 1)  # a number nobody knows; memory must not depend on it
        if self._fake_mode is not None and name == "_c10d_functional::wait_tensor":
            return args[0]  # as it is when it runs; its shape function makes a copy
        result = func(*args, **kwargs)
        self._see(name, args, kwargs, result)
        return result

    def _see(self, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        kind = self._default
        if name in GATHERS:
            kind = GATHERED
        elif name in HEADS:
            kind = HEAD
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and not is_traceable_wrapper_subclass(tensor):
                self._count(tensor.untyped_storage(), kind)
        if name == COPY_OUT:
            for tensor in kwargs["out"]:
                self._recount(tensor, GATHERED)
        elif name == REDUCE_INPUT:
            self._recount(kwargs["out"], REDUCED)
        elif name == REDUCE_SCATTER:
            self._recount(args[0], GRADIENTS)
        elif name == "aten::copy_" and self._kind(args[1]) == REDUCED:
            self._recount(args[0], GRADIENTS)  # one rank alone has nothing to reduce
        elif name == "aten::_to_copy" and self._kind(args[0]) == GRADIENTS:
            self._recount(result, GRADIENTS)  # to the dtype in which it is kept
        elif name in GATHERS:
            for tensor in tree_leaves(args[:2]):
                if isinstance(tensor, Tensor):
                    self._recount(tensor, GATHERED)
        workspace = 0
        if name in HEADS and self._device_type is not None:
            workspace = workspace_bytes(args[0], args[1], self._device_type, with_gradient=HEADS[name](args))
        self._measure(workspace)

    def _count(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._held:
            self._resized(storage)
            return
        self._held[key] = _Held(storage.nbytes(), kind, weakref.ref(storage, partial(self._freed, key)))
        self._add(kind, storage.nbytes())

    def _kind(self, tensor: Tensor) -> str | None:
        held = self._held.get(tensor.untyped_storage()._cdata)
        return None if held is None else held.kind

    def _recount(self, tensor: Tensor, kind: str) -> None:
        """What a tensor's storage is, known only now; a weight stays one."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        if held is not None and held.kind not in (WEIGHTS, OPTIMIZER, HOST):
            self._add(held.kind, -held.nbytes)
            held.kind = kind
            self._add(kind, held.nbytes)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is not None and held.nbytes != storage.nbytes():
            self._add(held.kind, storage.nbytes() - held.nbytes)
            held.nbytes = storage.nbytes()
            self._measure()

    def _freed(self, key: int, _reference: weakref.ref) -> None:
        held = self._held.pop(key)
        self._add(held.kind, -held.nbytes)

    def _add(self, kind: str, nbytes: int) -> None:
        self._live[kind] += nbytes
        self._total += nbytes * (kind != HOST)

    def _measure(self, workspace: int = 0) -> None:
        if self._total + workspace > self._peak.total:
            self._peak = self._now(workspace)

    def _now(self, workspace: int = 0) -> Peak:
        kinds = {kind: self._live[kind] for kind in KINDS}
        return Peak(self._total + workspace, kinds | {HEAD: kinds[HEAD] + workspace})
