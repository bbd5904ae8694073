"""The section `engine` of a configuration (`trainer.config`): who samples, and how weights reach it."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rollout.kinds import EMBEDDED, KINDS, LOOPBACK
from trainer.config_secrets import VariableName
from trainer.config_section import Positive, Section


class EngineConfig(Section):
    """Who samples. transformers: embedded (`rollout.kinds`), any machine. vllm: one vLLM beside each rank, in a process of its
    own. vllm-server: vLLM servers elsewhere (`python -m rollout.serve`)."""

    kind: Literal[KINDS] = "transformers"
    tokens_per_batch: Positive = 65536
    """embedded: upper bound on sequences × context of one `generate` call on one rank."""
    max_sequences: Positive = 256
    """Sequences decoded at once by one vLLM; of a server the ranks' shares together, so at most its --max-sequences."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """vllm: memory of the key-value cache of one engine; None: on a CPU what max_sequences × the longest context needs, on a GPU
    what gpu_memory_fraction leaves."""
    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1)
    """vllm on a GPU: share of the memory that the engine may use while it is awake."""
    threads: Positive = 1
    """vllm on a CPU: OpenMP threads of one engine. More than one stall each other wherever anything else runs beside."""
    tensor_parallel: Positive = 1
    """vllm: ranks, neighbours on one host, whose devices hold one vLLM together; the first of them asks it. 1: one beside each
    rank, as fast as any where the model fits."""
    pack_weights: bool = True
    """vllm on a CPU: linear layers packed for oneDNN, which decodes faster and makes a push several plain copies longer
    (`rollout.vllm.loading`, docs/rollout.md)."""
    servers: tuple[str, ...] = ()
    """vllm-server: base addresses, such as http://127.0.0.1:8000."""
    sync_host: str | None = None
    """vllm-server: address of rank 0's host under which the servers' hosts reach it. Weights then go to all of them by broadcast
    (NCCL, or gloo without a GPU). None: every server is on rank 0's host and maps its memory."""
    api_key_env: VariableName = "KEJU_API_KEY"
    """vllm-server: environment variable that holds the servers' key; unset or empty: none is sent."""
    wire: Literal["engine", "float8"] = "engine"
    """How weights travel. engine: in the engine's compute dtype. float8: matrices as e4m3 with a scale per output channel, half
    the bytes, and the sampler then differs from the policy by the rounding."""
    chunk_mib: Positive = 64
    """Least size of a transfer buffer; it grows to the largest layer."""
    start_seconds: float = Field(default=600.0, gt=0)
    """Deadline for an engine to be ready."""
    silence_seconds: float = Field(default=300.0, gt=0)
    """An engine at work that says nothing for so long is lost."""
    sync_seconds: float = Field(default=300.0, gt=0)
    """Deadline of each wait in a weight push."""
    probe_bound: float | None = Field(default=None, gt=0)
    """Largest difference in nats that a push's probe may show between engine and policy; None: 1e-3 where both compute in fp32
    and weights travel as they are, else 0.5."""

    overlap: bool = True
    """Judge outputs, and begin rounds that are certain to be needed, while the rest of a batch still decodes. False: one after
    the other, with the same outcome."""
    score_early: bool | None = None
    """Recompute the log-probabilities of groups that are certain of their place while the rest of a batch still decodes. None:
    with vllm-server, where engine and policy do not share a device. With batch.mini_batches 1."""
    one_step_off: bool = False
    """Sample step k + 1 while step k trains: every response is then one policy step old when it is trained on, and a recovered
    one two. Not the paper's algorithm, in which only recovered responses are old; no importance weight corrects it but
    objective.tis_cap. Needs vllm-server, or vllm on a CPU."""

    @property
    def embedded(self) -> bool:
        return self.kind in EMBEDDED

    @model_validator(mode="after")
    def _possible(self) -> EngineConfig:
        if self.one_step_off and self.embedded:
            raise ValueError("one_step_off needs an engine that samples beside the trainer: kind vllm-server, or vllm on a CPU")
        if self.score_early and self.one_step_off:
            raise ValueError("score_early and one_step_off exclude each other: the weights that score do not exist yet")
        if self.tensor_parallel > 1 and self.kind != "vllm":
            raise ValueError("tensor_parallel is for kind vllm; a server has its own (python -m rollout.serve --tensor-parallel)")
        if self.kind == "vllm-server" and not self.servers:
            raise ValueError("servers is empty: kind vllm-server needs at least one, such as servers: [http://127.0.0.1:8000]")
        for server in self.servers:
            if "@" in server:
                raise ValueError("servers: an address holds a name or password; put the key into the environment (api_key_env)")
            if not re.fullmatch(r"https?://[^/\s]+", server):
                raise ValueError(f"servers: {server!r} is not a base address such as http://127.0.0.1:8000")
            if self.sync_host is None and urlsplit(server).hostname not in LOOPBACK:
                raise ValueError(
                    f"servers: {server} is not on this host: set sync_host to the address under which it reaches this one, and "
                    "weights go to it by broadcast"
                )
        return self
