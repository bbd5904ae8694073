"""The engine's end of a weight push, as a weight-transfer engine of vLLM's own interface. Runs in vLLM's process; imports vLLM.

    start_weight_update()
    update_weights({"manifest": [{"name", "shape"}, …]})
    init_weight_transfer_engine({"host", "port", …})     # rollout.weights.broadcast.Meeting, where chunks come by broadcast
    update_weights({"chunk": {…}})                       # rollout.weights.wire, as often as it takes
    finish_weight_update()

Each tensor is checked before or while it is loaded (`rollout.vllm.loading`). vLLM does not say which tensors did not come: the
manifest does, and the checkpoint's own list.

Each worker of an engine (tensor parallel) checks what it maps or receives itself, and one that refuses makes vLLM's call fail as
a whole (`rollout.vllm.executor`).
"""

from __future__ import annotations

import json
import logging
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rollout.vllm.executor import keep_in_step
from rollout.vllm.loading import Loading, loading_of, prepare
from rollout.weights.broadcast import Meeting
from rollout.weights.folder import left_out
from rollout.weights.inbox import Inbox

BACKEND = "keju"
logger = logging.getLogger("vllm.keju")


def register() -> None:
    """Makes `weight_transfer_config={"backend": "keju"}` known to vLLM in this process, before it builds a model."""
    prepare()
    keep_in_step()
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
        self._loading: Loading | None = None
        self._inbox = Inbox(self.device)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._inbox.connect(Meeting(**asdict(init_info)), worker)

    def start_weight_update(self) -> None:
        if self._loading is None:
            self._loading = loading_of(self.model, self.model_config)
            logger.info("weights are loaded %s", self._loading.name)
        self._update = Update()
        self._loading.begin()

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
        self._loading.finish()

    def shutdown(self) -> None:
        self._inbox.close()

    def _take_manifest(self, manifest: list[dict[str, Any]]) -> None:
        announced = {entry["name"]: entry["shape"] for entry in manifest}
        tied = self.model_config.hf_config.tie_word_embeddings
        for name, shape in checkpoint_shapes(Path(self.model_config.model)).items():
            if left_out(name, tied=tied):
                continue
            if name not in announced:
                raise ValueError(f"weight {name!r} of the model folder is not among the {len(announced)} announced")
            if announced[name] != shape:
                raise ValueError(f"weight {name!r} is announced with shape {announced[name]}, the model's is {shape}")
        self._update.expected = announced

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        if "abandon" in chunk:
            raise ValueError(f"the trainer gave the push up: {chunk['abandon']}")
        entries, dtype = chunk["tensors"], self.model_config.dtype
        buffer = self._inbox.receive(chunk["buffer"])  # first: others take part in a broadcast
        self._expect(entries, str(dtype).removeprefix("torch."))
        self._loading.load(entries, buffer, dtype)

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


register()  # importing is all that vLLM's workers do: see WorkerExtension
