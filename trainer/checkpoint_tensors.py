"""A checkpoint's tensors: weights and moments, through torch.distributed.checkpoint. Sharded as on the ranks that saved them; any
number of ranks reads them.

    dcp/__R_0.distcp    rank R's shards, each as torch.save wrote it, read with weights_only
    dcp/.metadata       which shard lies where: a pickle, of which nothing but the classes of ALLOWED is made

Only tensors lie there. What else torch would store, an optimizer's rates, it would read back through plain pickle; each update
sets those anyway.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer.adamw8bit import local
from trainer.checkpoint_folder import INDEX, TENSORS, read_manifest
from trainer.host_memory import HostMemory

if TYPE_CHECKING:
    from trainer.actor import Actor

_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
DTYPES = ("float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool")
ALLOWED = frozenset(
    [
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
        *((_METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")),
        (_FILES, "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        *(("torch", name) for name in DTYPES),
    ]
)
"""(module, name) of all that an index may name. Not BytesStorageMetadata: what it describes is read by plain pickle."""
ENTRY_BYTES = 2048
"""At most, of what stands in the files beside a shard's values: its header and its place in the index."""

# Of a process alone, which is asked for.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def tensors_of(actor: Actor) -> dict[str, Tensor]:
    """All that must survive, by its name in a checkpoint: this rank's shards, the policy's and the optimizer's own memory."""
    model, optimizer = get_state_dict(actor.policy, actor.optimizer)
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    for name, state in optimizer["state"].items():
        tensors |= {f"optimizer.state.{name}.{key}": value for key, value in state.items()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is no tensor but {type(tensor).__name__}: a checkpoint holds tensors only")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def bytes_of(tensors: dict[str, Tensor], ranks: int) -> int:
    """On the disk, of all ranks together, and a little more. Copies of the model (HSDP) are written once."""
    return sum(tensor.numel() * tensor.dtype.itemsize + ranks * ENTRY_BYTES for tensor in tensors.values())


class Staging:
    """Copies of this rank's shards in host memory, from which a checkpoint is written while the policy goes on changing.

    Takes as much as the shards: of a parameter 12 bytes with fp32 weights and AdamW, 6.03 with fp32 weights and adamw8bit, 4.03
    with bf16 weights and adamw8bit, over the ranks that share a copy of the model. Taken at the first save and used by each one
    after it, page-locked where the shards are on a GPU; the GPU's memory is not needed twice.
    """

    def __init__(self) -> None:
        self._memory: dict[bool, HostMemory] = {}
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, their values in host memory; they are there when this returns. Overwrites what it gave before."""
        copies: dict[str, Tensor] = {}
        shared: dict[tuple[int, torch.Size], Tensor] = {}
        devices = set()
        for name, tensor in tensors.items():
            here = local(tensor)
            place = (here.data_ptr(), here.shape)  # tied weights are one
            if not here.numel() or place not in shared:
                shared[place] = self._buffer(name, here).copy_(here, non_blocking=True)
            held = shared[place]
            copies[name] = DTensor(held, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else held
            devices.add(here.device)
        for device in devices:
            torch.get_device_module(device).synchronize(device)
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        if name not in self._buffers:
            memory = self._memory.setdefault(like.is_cuda, HostMemory(pinned=like.is_cuda))
            self._buffers[name] = memory.zeros(like.shape, like.dtype)
        return self._buffers[name]


def write(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Into a checkpoint's folder, and to the disk. A collective; a failure of one rank is a CheckpointException on all."""
    parts: dict[str, dict[str, Tensor]] = {}  # of few names at the top, each of which torch logs
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    dcp.save(parts, storage_writer=Writer(folder / TENSORS), process_group=ranks.group, no_dist=ranks.size == 1)


def files_of(rank: int, folder: Path) -> list[Path]:
    """What `write` wrote there on this rank."""
    written = list((folder / TENSORS).glob(f"__{rank}_*.distcp"))
    return [*written, folder / INDEX] if rank == 0 else written


def read(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """A whole checkpoint's values into `tensors`. A collective. Raises InputError where it has others, or cannot be read.

    torch's set_state_dict would move offloaded moments to the GPU, and give moments the dtype of their weights.
    """
    check_kinds(folder, tensors)
    try:
        dcp.load(tensors, storage_reader=Reader(folder), process_group=ranks.group, no_dist=ranks.size == 1)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise InputError(
            f"{folder / TENSORS}: cannot be read ({first.__class__.__name__}: {first}); move this checkpoint away to continue "
            "from the one before"
        ) from error


def check_kinds(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raises InputError unless a checkpoint has these tensors in these dtypes and sizes: reading would cast, or end in a
    traceback."""
    stored = Reader(folder).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        there = stored.get(name)
        if there is None:
            found = "is not there"
        elif there.properties.dtype != tensor.dtype:
            found = f"is {there.properties.dtype}"
        elif there.size != tensor.shape:
            found = f"has the sizes {list(there.size)}"
        else:
            continue
        wanted = tensor.dtype if there is None or there.size == tensor.shape else f"{tensor.dtype} {list(tensor.shape)}"
        raise InputError(
            f"{folder}: {name} {found}, and this run's is {wanted}: set model.weights and optimizer.kind to what they were (and "
            "model.path), or start another run from an export (python -m trainer.export)"
        )


class Writer(FileSystemWriter):
    """torch's, with everything on the disk when it returns. It names no path of this machine in the index, and a full disk is an
    OSError: torch.save, which is interrupted by one, raises another error over it."""

    def __init__(self, folder: Path) -> None:
        # No copies ahead: in another thread they would be made on the first GPU.
        super().__init__(folder, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)

    def write_data(self, *arguments: Any) -> Any:
        with disk_faults():
            return super().write_data(*arguments)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


@contextlib.contextmanager
def disk_faults() -> Iterator[None]:
    """Raises the OSError that another error came of."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause is error:
            raise
        raise cause from None


class Reader(FileSystemReader):
    """torch's, of a checkpoint's folder, with an index that can name nothing but what an index needs."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint / TENSORS)
        self._checkpoint = checkpoint

    def read_metadata(self, *_arguments: Any, **_options: Any) -> Metadata:
        """Raises InputError."""
        path = self._checkpoint / INDEX
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            _check_index(metadata, {name.removeprefix(f"{TENSORS}/") for name in read_manifest(self._checkpoint)})
        except Exception as error:  # a pickle may end in any
            raise InputError(f"{path}: refused: {error}; take a checkpoint that this version of Keju wrote") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's index needs")
        return super().find_class(module, name)


def _check_index(metadata: Any, files: set[str]) -> None:
    """Raises ValueError where it describes something else than tensors in these files."""
    if type(metadata) is not Metadata or type(metadata.storage_meta) is not StorageMeta:
        raise ValueError("it is no index of a checkpoint")
    for name, each in metadata.state_dict_metadata.items():
        if type(each) is not TensorStorageMetadata or type(each.properties.dtype) is not torch.dtype:
            raise ValueError(f"{name} is no tensor")
    for index, place in metadata.storage_data.items():
        if place.relative_path not in files or place.transform_descriptors:
            raise ValueError(f"{index.fqn} lies in {place.relative_path!r}, which the manifest does not name")
