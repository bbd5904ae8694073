"""How the decoder's layers run: what of their forward is kept for the backward and where it waits, and whether they are compiled.

Checkpointing keeps a layer's input alone, [T, D], and runs the layer again in the backward. Of what that computes a second time,
some results cost much time and little memory; with a budget of bytes they are kept, in this order, for as many layers as it has
room for:

    attention    output and log-sum-exp         L operations per byte for sequences of L tokens, in bf16
    matmuls      query, key, value, output      D operations per byte; the last one, down, is not needed for a backward
                 projection, gate, up

and what is then computed again is norms, rotary embedding and the activation function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.attention import leave_uncompiled
from trainer.config import RunConfig

aten = torch.ops.aten

MATMULS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default})
ATTENTION_NAMES = (
    "aten::_scaled_dot_product_", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::",
)  # fmt: skip
"""How the names of operations begin that compute attention, whichever kernel runs."""


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """checkpointing: keep a layer's input alone. saved_bytes: of one rank, for what is dear to compute again, in a micro-batch of
    `tokens` tokens on it. offload: inputs wait in the host's memory. compile: torch.compile of each layer."""

    checkpointing: bool = False
    saved_bytes: int = 0
    tokens: int = 0
    offload: bool = False
    compile: bool = False


KEEP_ALL = LayerOptions()


def layer_options(config: RunConfig) -> LayerOptions:
    """How a run's layers run; the budget is planned for the largest micro-batch."""
    model = config.model
    return LayerOptions(
        checkpointing=model.gradient_checkpointing,
        saved_bytes=int(model.saved_gib * 2**30),
        tokens=max(stage.actor.tokens_per_micro_batch for stage in config.stages),
        offload=model.offload_activations,
        compile=model.compile,
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """What one checkpointed layer keeps beside its input."""

    attention: bool = False
    matmuls: bool = False


def plan_kept(layers: int, attention_bytes: int, matmul_bytes: int, budget: int) -> list[Kept]:
    """What each layer keeps: attention's results of as many layers as the budget holds, from the first, then those of matmuls."""
    attention = min(layers, budget // attention_bytes)
    matmuls = min(attention, (budget - attention * attention_bytes) // matmul_bytes)
    return [Kept(index < attention, index < matmuls) for index in range(layers)]


def kept_bytes(config: Any, tokens: int, itemsize: int) -> tuple[int, int]:
    """(of attention, of matmuls) of one layer of a transformers configuration, for `tokens` tokens; itemsize: compute dtype's."""
    heads = config.num_attention_heads
    dimension = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value = (getattr(config, "num_key_value_heads", None) or heads) * dimension
    outputs = heads * dimension + 2 * key_value + config.hidden_size + 2 * config.intermediate_size
    return tokens * heads * (dimension * itemsize + 4), tokens * outputs * itemsize


def prepare_layers(causal_lm: nn.Module, options: LayerOptions, itemsize: int) -> None:
    """Of a transformers model, before it is sharded."""
    layers = causal_lm.model.layers
    if options.compile:
        leave_uncompiled()
        for layer in layers:
            # Its forward alone: FSDP's hooks and checkpointing stay outside and run as they are.
            layer.forward = torch.compile(layer.forward, dynamic=True)
    if not options.checkpointing:
        return
    kept = [Kept()] * len(layers)
    if options.saved_bytes:
        kept = plan_kept(len(layers), *kept_bytes(causal_lm.config, options.tokens, itemsize), options.saved_bytes)
    offload = ActivationOffload() if options.offload else None
    for layer, keeps in zip(layers, kept, strict=True):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpointed(keeps, causal_lm.config.intermediate_size, offload)


def checkpointed(keeps: Kept, intermediate_size: int, offload: ActivationOffload | None) -> Callable[..., Any]:
    """(function, its inputs) → its result, as transformers' layers call it."""
    run = partial(checkpoint, use_reentrant=False)
    if keeps.attention or keeps.matmuls:
        policy = partial(_policy, keeps, intermediate_size)
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, policy))
    if offload is None:
        return run

    def run_offloaded(function: Callable[..., Any], *inputs: Any) -> Any:
        with offload.hooks():  # checkpoint's own, which are inside, see all that the layer saves; these see its inputs
            return run(function, *inputs)

    return run_offloaded


def _policy(keeps: Kept, intermediate_size: int, _context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    if keeps.attention and operation._schema.name.startswith(ATTENTION_NAMES):
        return CheckpointPolicy.MUST_SAVE
    if keeps.matmuls and operation in MATMULS:
        inner = arguments[1 if operation is aten.addmm.default else 0].shape[-1]
        return CheckpointPolicy.PREFER_RECOMPUTE if inner == intermediate_size else CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class ActivationOffload:
    """Moves what is saved under `hooks` to the host's memory and brings it back for the backward, each beside the computation: on
    a stream of its own, the next one up (that of the layer before) already while this one's layer is computed again. On a CPU it
    copies, which frees nothing."""

    def __init__(self) -> None:
        self._saved: list[ref[_Offloaded]] = []
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None

    def hooks(self) -> AbstractContextManager:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if not torch.is_floating_point(tensor):
            return tensor
        place = _Offloaded(len(self._saved), tensor.device)
        self._saved.append(ref(place))
        with self._on(0, tensor.device, after_current=True):
            place.host = to_host(tensor)
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream())
                place.ready = torch.cuda.current_stream().record_event()
        return place

    def _unpack(self, place: Any) -> Tensor:
        if isinstance(place, Tensor):
            return place
        tensor = self._fetch(place)
        if place.fetched is not None:
            torch.cuda.current_stream().wait_event(place.fetched)
            tensor.record_stream(torch.cuda.current_stream())
        place.back = None
        del self._saved[place.index :]  # a backward goes from the last to the first
        before = self._saved[-1]() if self._saved else None
        if before is not None and place.device.type == "cuda":
            self._fetch(before)
        return tensor

    def _fetch(self, place: _Offloaded) -> Tensor:
        if place.back is None:
            with self._on(1, place.device):
                if place.ready is not None:
                    torch.cuda.current_stream().wait_event(place.ready)
                place.back = place.host.to(place.device, non_blocking=True, copy=True)
                if place.device.type == "cuda":
                    place.fetched = torch.cuda.current_stream().record_event()
        return place.back

    @contextmanager
    def _on(self, stream: int, device: torch.device, after_current: bool = False) -> Iterator[None]:
        if device.type != "cuda":
            yield
            return
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        if after_current:
            self._streams[stream].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._streams[stream]):
            yield


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory; of a GPU's tensor begun, on the current stream."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Offloaded:
    """A saved tensor's place in the host's memory."""

    index: int
    device: torch.device
    host: Tensor | None = None
    ready: Any = None
    """Event: the host's copy is whole."""
    back: Tensor | None = None
    fetched: Any = None
    """Event: `back` is whole."""
