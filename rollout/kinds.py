"""The kinds of engine by name, and where a server is, for configurations and command lines: it imports nothing heavy.

EMBEDDED is the one place that names an engine in the rank's own process: it samples a batch at once on a model of its own,
neither streams nor samples beside the trainer, and has no prefix cache. `rollout.engines` builds each kind.
"""

from __future__ import annotations

import importlib
from typing import Any

EMBEDDED = {"transformers": "rollout.transformers_engine.TransformersEngine"}
"""Kind → its class, which is made as TransformersEngine is."""

KINDS = (*EMBEDDED, "vllm", "vllm-server")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts of a server's address that say that it is on this one, and can map its memory."""


def embedded_class(kind: str) -> Any:
    module, _, name = EMBEDDED[kind].rpartition(".")
    return getattr(importlib.import_module(module), name)
