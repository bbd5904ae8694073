"""Tiny random models in a folder, as weight sources, and what the policy itself says of a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rollout.types import Sample
from rollout.weights.source import TensorMeta


def tiny_qwen2(seed: int, *, tied: bool, vocabulary: int, layers: int = 3) -> nn.Module:
    """Random to the last bias, and wide enough apart that greedy choices are no near-ties."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=1024, initializer_range=0.05,
        )
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


class ModelSource:
    """`rollout.weights.source.WeightSource` of a plain model. change: what is done to each (name, tensor), None to leave it
    out."""

    def __init__(self, model: nn.Module, change: Callable[[str, Tensor], Tensor | None] | None = None) -> None:
        self._model, self._change = model, change

    def metadata(self) -> list[TensorMeta]:
        return [TensorMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            tensor = parameter.detach()
            if self._change is not None:
                tensor = self._change(name, tensor)
            if tensor is not None:
                yield name, tensor


@torch.no_grad()
def continuation_logits(model: nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> Tensor:
    """[n, V]: what the model says at each of the n places where `tokens` were chosen."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long().unsqueeze(0)
    return model(ids).logits[0, len(prompt) - 1 : -1]


def greedy_agreement(model: nn.Module, prompts: Sequence[np.ndarray], samples: Sequence[Sample]) -> tuple[int, int]:
    """(tokens that are the model's own greedy choice after what came before, all tokens)."""
    agreed = total = 0
    for prompt, sample in zip(prompts, samples, strict=True):
        choices = continuation_logits(model, prompt, sample.token_ids).argmax(-1).numpy()
        agreed, total = agreed + int((choices == sample.token_ids).sum()), total + len(choices)
    return agreed, total


def largest_gap(model: nn.Module, prompts: Sequence[np.ndarray], samples: Sequence[Sample], temperature: float) -> float:
    """Largest |log-probability reported - the model's own|, nats."""
    gaps = []
    for prompt, sample in zip(prompts, samples, strict=True):
        logprobs = (continuation_logits(model, prompt, sample.token_ids).double() / temperature).log_softmax(-1)
        own = logprobs.gather(1, torch.from_numpy(sample.token_ids).long().unsqueeze(1)).squeeze(1).numpy()
        gaps.append(np.abs(own - sample.logprobs).max())
    return float(np.max(gaps))
