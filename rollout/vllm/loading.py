"""How weights that arrive get into a vLLM model that is already there. Runs in vLLM's process; imports vLLM.

`InPlace`: where the model's parameters lie as the checkpoint's do (nothing quantized, nothing packed), they are copied into the
very memory that the engine computes from, and checked in the same pass: one read, one write, no memory beside.

`Layerwise`: else, through vLLM's own reload, which makes each layer anew and lets it convert what has come. What that leaves to
be done, or does wrong, each with its test in tests/rollout/test_vllm_push.py:
- It keeps views of what it was given until a layer is whole: where a chunk's buffer is written anew before that (a vocabulary
  padded to a multiple of 64 is never whole before the end), it would assemble something else. They are copied.
- On a CPU, linear layers are packed when weights have been loaded; a tied lm_head is not loaded, keeps its old packing, and must
  be packed again.

On a CPU vLLM packs linear layers for oneDNN, which then multiplies faster, but packing costs several plain copies at every push.
With KEJU_PACK_WEIGHTS=0 in the environment of vLLM's processes (`engine.pack_weights: false`, `rollout.serve
--no-pack-weights`) they stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.platforms import current_platform

from kernels.checksum import copy_checksum
from rollout.vllm.settings import PACK_VARIABLE
from rollout.weights.wire import check, mismatch, read

PLAIN = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""They compute from a parameter as it was loaded, but for a CPU's packing."""


class Loading(Protocol):
    """begin, then load as often as it takes, then finish; or begin again."""

    name: str

    def begin(self) -> None: ...

    def load(self, entries: list[dict[str, Any]], buffer: Tensor, dtype: torch.dtype) -> None:
        """The tensors of a chunk (`rollout.weights.wire`), into a model that computes in dtype. buffer is another's as soon as
        this returns. Raises ValueError where the bytes are not those that were sent."""

    def finish(self) -> None:
        """Raises ValueError where a parameter of the model was not loaded."""


def prepare() -> None:
    """Before vLLM builds a model in this process."""
    if current_platform.is_cpu():
        torch._scaled_mm = _emulated
        torch.cpu._init_amx()  # vLLM's attention leaves asking the system to oneDNN, which may have had nothing to do before it
        if not _packs():
            utils.dispatch_cpu_unquantized_gemm = _leave_plain


def loading_of(model: nn.Module, model_config: Any) -> Loading:
    """The one that fits a model that vLLM has built."""
    kept = not _packs() if current_platform.is_cpu() else current_platform.is_cuda() and not model_config.use_mla
    methods = {type(getattr(module, "quant_method", None)) for module in model.modules()}
    # Quantized while it is loaded, a model has parameters that no checkpoint has.
    return InPlace(model) if kept and methods <= {type(None), *PLAIN} else Layerwise(model, model_config)


class InPlace:
    """See this module's head."""

    name = "in place"

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._loaded: set[str] = set()

    def begin(self) -> None:
        self._loaded = set()

    def load(self, entries: list[dict[str, Any]], buffer: Tensor, dtype: torch.dtype) -> None:
        with CheckedCopy() as copy:
            self._loaded |= self._model.load_weights(self._read(entries, buffer, dtype, copy))
        copy.end(buffer)

    @staticmethod
    def _read(
        entries: list[dict[str, Any]], buffer: Tensor, dtype: torch.dtype, copy: CheckedCopy
    ) -> Iterator[tuple[str, Tensor]]:
        for entry in entries:
            whole = "scale" not in entry
            if not whole:
                check(entry, buffer)
            tensor = read(entry, buffer, dtype)
            if whole:
                copy.expect(tensor, entry)
            yield entry["name"], tensor
            if whole and not copy.happened():  # loaded in parts, or not at all, or not yet
                check(entry, buffer)

    def finish(self) -> None:
        check_all_loaded(self._model, self._loaded)


class CheckedCopy(TorchFunctionMode):
    """While it is entered, `copy_` of the tensor that is expected, whole and into one piece of memory, is one pass that takes the
    checksum on the way (`kernels.checksum.copy_checksum`). Any other call stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._source: Tensor | None = None
        self._entry: dict[str, Any] = {}

    def expect(self, source: Tensor, entry: dict[str, Any]) -> None:
        self._source, self._entry = source, entry

    def end(self, buffer: Tensor) -> None:
        """Checks what is still expected: the last tensor, where the loader did not ask for another behind it."""
        if not self.happened():
            check(self._entry, buffer)

    def happened(self) -> bool:
        """Whether the expected copy came; it is expected no longer."""
        happened, self._source = self._source is None, None
        return happened

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function is not Tensor.copy_ or self._source is None or len(arguments) < 2 or not self._is_it(*arguments[:2]):
            return function(*arguments, **(named or {}))
        target, source = arguments[:2]
        self._source = None
        if copy_checksum(source.detach(), target.detach(), threads=torch.get_num_threads()) != self._entry["checksum"]:
            raise ValueError(mismatch(self._entry["name"], self._entry))
        return target

    def _is_it(self, target: Tensor, source: Tensor) -> bool:
        expected = self._source
        return (
            source.data_ptr() == expected.data_ptr()
            and source.shape == expected.shape == target.shape
            and source.dtype == target.dtype
            and source.is_contiguous()
            and target.is_contiguous()
        )


class Layerwise:
    """See this module's head."""

    name = "layer by layer"

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model, self._config = model, model_config
        self._loaded: set[str] = set()

    def begin(self) -> None:
        """Undoes an update that was not finished: layers in the middle of it get back the tensors they had."""
        for layer in self._model.modules():
            info = get_layerwise_info(layer)
            if info.can_load() and info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
                info.reset()
        initialize_layerwise_reload(self._model)
        self._loaded = set()

    def load(self, entries: list[dict[str, Any]], buffer: Tensor, dtype: torch.dtype) -> None:
        def checked() -> Iterator[tuple[str, Tensor]]:
            for entry in entries:
                check(entry, buffer)
                yield entry["name"], read(entry, buffer, dtype)

        self._loaded |= self._model.load_weights(checked())
        self._keep_unfinished(buffer)

    def finish(self) -> None:
        if self._config.quantization is None:
            check_all_loaded(self._model, self._loaded)
        finalize_layerwise_reload(self._model, self._config)
        self._pack_tied_head()

    def _keep_unfinished(self, buffer: Tensor) -> None:
        """Copies what vLLM has put aside of a chunk."""
        memory = buffer.untyped_storage().data_ptr()
        for layer in self._model.modules():
            for _, bound in get_layerwise_info(layer).loaded_weights:
                for name, value in bound.arguments.items():
                    if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == memory:
                        bound.arguments[name] = value.clone()

    def _pack_tied_head(self) -> None:
        head = getattr(self._model, "lm_head", None)
        if head is None or not getattr(self._model.config, "tie_word_embeddings", False) or head.weight.device.type != "cpu":
            return
        head.quant_method.process_weights_after_loading(head)


def check_all_loaded(model: nn.Module, loaded: set[str]) -> None:
    """loaded: what the model's own load_weights says it has. Raises ValueError where that is not every parameter, each by any of
    its names: one without a counterpart in the checkpoint would keep its random values."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    # A tied head is the embedding, though a reload makes a parameter of its own of it for a while.
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", False) else set()
    missing = sorted(min(each) for each in names.values() if not each & (loaded | tied))
    if missing:
        raise ValueError(f"vLLM's parameters {missing[:3]} ({len(missing)} in all) took nothing of what came")


def _packs() -> bool:
    return os.environ.get(PACK_VARIABLE, "1") != "0"


_scaled_mm = torch._scaled_mm


def _emulated(*arguments: Any, **options: Any) -> Tensor:
    """FP8 on a CPU by torch's own emulation. Where there is AMX, torch hands the product to oneDNN, which has nothing but its
    reference for it: the same result, some hundred times slower."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return _scaled_mm(*arguments, **options)
    finally:
        torch._C._set_mkldnn_enabled(enabled)


_pack = utils.dispatch_cpu_unquantized_gemm


def _leave_plain(layer: nn.Module, remove_weight: bool) -> None:
    """In place of vLLM's packing."""
    if layer.weight.ndim == 2:
        layer.cpu_linear = nn.functional.linear
    else:  # no linear layer
        _pack(layer, remove_weight)
