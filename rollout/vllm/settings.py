"""What a vLLM engine is started with: plain data, sent to its process as one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

LEAST_FRACTION = 0.01
"""What a vLLM whose cache has a given size is told of its GPU's memory: it then sizes nothing by it, and yet refuses to start
where so much is not free. Its own default, 0.92, is never free beside a policy."""
PACK_VARIABLE = "KEJU_PACK_WEIGHTS"
"""0: vLLM's linear layers on a CPU stay as they are loaded (`rollout.vllm.loading`). A variable, as vLLM's workers may be
processes of their own."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """model: Hugging Face folder, for its configuration; weights come by push. dtype: "float32" or "bfloat16"."""

    model: str
    dtype: str
    max_model_len: int
    max_sequences: int = 256
    kv_cache_bytes: int | None = None
    """None on a GPU: what gpu_memory_fraction leaves."""
    gpu_memory_fraction: float = 0.85
    sleep: bool = False
    """Whether weights and cache can be released between rollouts; on a GPU."""
    tensor_parallel: int = 1
    """Devices that share the model; a worker process on each where there are several."""
    pack_weights: bool = True
    """On a CPU: `rollout.vllm.loading`."""
    stored: bool = False
    """The folder's own weights as they are stored, quantized ones too; else random ones, until a push."""
    seed: int = 0

    def memory_arguments(self) -> dict[str, float]:
        """Of vLLM's EngineArgs."""
        if self.kv_cache_bytes is None:
            return {"gpu_memory_utilization": self.gpu_memory_fraction}
        return {"kv_cache_memory_bytes": self.kv_cache_bytes, "gpu_memory_utilization": LEAST_FRACTION}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> VllmSettings:
        return cls(**json.loads(text))


def kv_cache_bytes(config: dict, dtype_bytes: int, sequences: int, tokens: int, block: int = 128) -> int:
    """Enough for `sequences` of `tokens` each, from a model's config.json: 2 · layers · key-value heads · head dimension ·
    tokens."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    dimension = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    per_token = 2 * config["num_hidden_layers"] * heads * dimension * dtype_bytes
    return per_token * block * (-(-tokens // block) * sequences + 8)
