"""The model that is planned for: a folder's config.json, or one of these by name, whose weights need not be at hand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import InputError
from rollout.model_folder import read_config
from rollout.weights.source import TensorMeta

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 1e5, "tie_word_embeddings": True, "vocab_size": 49152,
}  # fmt: skip
_SIZES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, {"tie_word_embeddings": True, "vocab_size": 151936}),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, {"tie_word_embeddings": True, "vocab_size": 151936}),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, {}),
    "qwen2.5-14b": (5120, 48, 40, 8, 13824, {}),
    "qwen2.5-32b": (5120, 64, 40, 8, 27648, {}),
}
_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
NAMED: dict[str, dict[str, Any]] = {
    name: _QWEN2 | dict(zip(_NAMES, sizes, strict=True)) | other for name, (*sizes, other) in _SIZES.items()
} | {"smollm2-135m": _LLAMA | dict(zip(_NAMES, (576, 30, 9, 3, 1536), strict=True))}
"""config.json by name, from the models' cards. DeepSeek-R1-Distill-Qwen has the sizes of the Qwen2.5 of its name, but for 1.5B,
which is untied there. smollm2-135m: HuggingFaceTB/SmolLM2-135M."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a causal model, what cost is counted in. body: weights of the layers' matrices; head: of the output matrix; parameters:
    all, a tied one once. attention_width: heads × head dimension."""

    body: int
    head: int
    parameters: int
    layers: int
    attention_width: int
    cache_elements: int
    """Of the key-value cache, per token, all layers."""
    key_value_heads: int

    @classmethod
    def of(cls, config: dict[str, Any], metadata: list[TensorMeta]) -> Sizes:
        """config: config.json."""
        heads = config["num_attention_heads"]
        dimension = config.get("head_dim") or config["hidden_size"] // heads
        key_value_heads = config.get("num_key_value_heads") or heads
        return cls(
            body=sum(meta.elements for meta in metadata if ".layers." in meta.name and len(meta.shape) == 2),
            head=config["vocab_size"] * config["hidden_size"],
            parameters=sum(meta.elements for meta in metadata),
            layers=config["num_hidden_layers"],
            attention_width=heads * dimension,
            cache_elements=2 * config["num_hidden_layers"] * key_value_heads * dimension,
            key_value_heads=key_value_heads,
        )


@contextmanager
def model_folder(path: Path, architecture: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(a folder with a config.json, what it says): of `architecture` where one is named, else of `path`. Raises InputError."""
    if architecture is None:
        yield path, read(path)
        return
    if architecture not in NAMED:
        raise InputError(f"command line: --architecture: {architecture!r} is not known; use one of {', '.join(NAMED)}")
    with tempfile.TemporaryDirectory(prefix="keju-plan-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(NAMED[architecture]), encoding="utf-8")
        yield Path(folder), NAMED[architecture]


def read(path: Path) -> dict[str, Any]:
    """A folder's config.json; its weights need not be there. Raises InputError."""
    named = f"plan for a named model: --architecture with one of {', '.join(NAMED)}"
    mend = f"fetch the model folder (a plan needs config.json alone), or {named}"
    config = read_config(path, mend)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise InputError(
                f"{path}/config.json: {key}: {config.get(key)!r} is not a whole number above 0; fetch the model folder again"
            )
    return config
