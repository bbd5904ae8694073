"""What vLLM's log says about itself."""

from __future__ import annotations

import re


def linear_kernels(log: str) -> list[str]:
    """Which of vLLM's kernels multiply quantized linear layers; none for a model that is not quantized."""
    return sorted({f"{kernel} for {layer}" for kernel, layer in re.findall(r"Selected (\w+Kernel) for (\w+)", log)})
