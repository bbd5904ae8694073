"""The engine's end of a weight push, as a weight-transfer engine of vLLM's own interface. Runs in vLLM's process; imports vLLM.

    start_weight_update()
    update_weights({"manifest": [{"name", "shape"}, …]})
    init_weight_transfer_engine({"host", "port", …})     # rollout.weights.broadcast.Meeting, where chunks come by broadcast
    update_weights({"chunk": {…}})                       # rollout.weights.wire, as often as it takes
    finish_weight_update()

What vLLM leaves to be done, or does wrong, each with its test in tests/rollout/test_vllm_push.py:
- Its layerwise reload keeps views of what it was given until a layer is whole: where a chunk's buffer is written anew before that
  (a vocabulary padded to a multiple of 64 is never whole before the end), it would assemble something else. They are copied.
- On a CPU, linear layers are packed when weights have been loaded; a tied lm_head is not loaded, keeps its old packing, and must
  be packed again.
- It does not say which tensors did not come: the manifest does, and the checkpoint's own list.

Each worker of an engine (tensor parallel) checks what it maps or receives itself, and one that refuses makes vLLM's call fail as
a whole. vLLM's executor then leaves the other workers' answers to that call in their queues, so that an engine of several workers
must be started anew after a refusal, as `rollout.weights.sync` does with any.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info

from rollout.weights.broadcast import Meeting
from rollout.weights.inbox import Inbox
from rollout.weights.wire import check, read

BACKEND = "keju"


def register() -> None:
    """Makes `weight_transfer_config={"backend": "keju"}` known to vLLM in this process; once is enough."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, KejuTransferEngine)


class WorkerExtension:
    """Where an engine's workers are processes of their own (tensor parallel), `worker_extension_cls=EXTENSION` makes each of them
    import this module, and so know the backend."""


EXTENSION = f"{__name__}.{WorkerExtension.__name__}"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """`rollout.weights.broadcast.Meeting`."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    seconds: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One of the two."""

    manifest: list[dict[str, Any]] | None = None
    chunk: dict[str, Any] | None = None


@dataclass
class Update:
    """One under way."""

    expected: dict[str, list[int]] | None = None
    arrived: set[str] = field(default_factory=set)


class KejuTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Raises ValueError for whatever does not fit; an update that failed is undone so far that another may start."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._update = Update()
        self._inbox = Inbox(self.device)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._inbox.connect(Meeting(**asdict(init_info)), worker)

    def start_weight_update(self) -> None:
        _abandon_reload(self.model)
        self._update = Update()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        try:
            if update_info.manifest is not None:
                self._take_manifest(update_info.manifest)
            if update_info.chunk is not None:
                self._take_chunk(update_info.chunk)
        except Exception:
            self._inbox.leave()
            raise

    def finish_weight_update(self) -> None:
        update = self._update
        missing = sorted(set(update.expected or {}) - update.arrived)
        if update.expected is None or missing:
            raise ValueError(f"weights {missing[:3]} ({len(missing)} in all) did not come")
        finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied_head(self.model)

    def shutdown(self) -> None:
        self._inbox.close()

    def _take_manifest(self, manifest: list[dict[str, Any]]) -> None:
        announced = {entry["name"]: entry["shape"] for entry in manifest}
        tied = self.model_config.hf_config.tie_word_embeddings
        for name, shape in checkpoint_shapes(Path(self.model_config.model)).items():
            if name == "lm_head.weight" and tied:
                continue
            if name not in announced:
                raise ValueError(f"weight {name!r} of the model folder is not among the {len(announced)} announced")
            if announced[name] != shape:
                raise ValueError(f"weight {name!r} is announced with shape {announced[name]}, the model's is {shape}")
        self._update.expected = announced

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        """All bytes are checked before any is loaded."""
        if "abandon" in chunk:
            raise ValueError(f"the trainer gave the push up: {chunk['abandon']}")
        entries, dtype = chunk["tensors"], self.model_config.dtype
        buffer = self._inbox.receive(chunk["buffer"])  # first: others take part in a broadcast
        self._expect(entries, str(dtype).removeprefix("torch."))
        for entry in entries:
            check(entry, buffer)
        self.model.load_weights((entry["name"], read(entry, buffer, dtype)) for entry in entries)
        _keep_unfinished(self.model, buffer)

    def _expect(self, entries: list[dict[str, Any]], dtype: str) -> None:
        update = self._update
        for entry in entries:
            name, shape = entry["name"], entry["shape"]
            if name in update.arrived or shape != (update.expected or {}).get(name):
                raise ValueError(f"weight {name!r} {shape} was not announced, or came twice")
            if "scale" not in entry and entry["dtype"] != dtype:
                raise ValueError(f"weight {name!r} comes as {entry['dtype']}, the engine computes in {dtype}")
            update.arrived.add(name)


def checkpoint_shapes(folder: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor in a model folder's safetensors files, from their headers; empty where there are none."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _keep_unfinished(model: nn.Module, buffer: torch.Tensor) -> None:
    """Copies what vLLM has put aside of a chunk, whose memory goes back to the trainer now."""
    memory = buffer.untyped_storage().data_ptr()
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for name, value in bound.arguments.items():
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == memory:
                    bound.arguments[name] = value.clone()


def _abandon_reload(model: nn.Module) -> None:
    """Undoes an update that was not finished: layers in the middle of it get back the tensors they had."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            _place_kernel_tensors(layer, info)
            info.reset()


def _pack_tied_head(model: nn.Module) -> None:
    head = getattr(model, "lm_head", None)
    if head is None or not getattr(model.config, "tie_word_embeddings", False) or head.weight.device.type != "cpu":
        return
    head.quant_method.process_weights_after_loading(head)


register()  # importing is all that vLLM's workers do: see WorkerExtension
