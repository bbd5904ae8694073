"""Problems for the row operations, from every dtype, layout, mask and size a kernel may trip over, and what to measure with."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference

INF = float("inf")
SIZES = [255, 1023, 1024, 1025, 2047, 2048, 2049, 3333, 4095, 4096, 4097, 6150, 8191, 8192, 8193]
"""Vocabularies around the kernels' tiles."""

Problem = tuple[Tensor, Tensor, float | Tensor, Tensor, Tensor]


def naive(logits_TV: Tensor, labels_T: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """In fp32 with log_softmax; ignored rows as in the definition, for the comparison's sake."""
    temperature = temperature.float().unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    log_p_TV = (logits_TV.float() / temperature).log_softmax(1)
    kept_T = (labels_T != reference.IGNORE).float()
    logprob_T = log_p_TV.gather(1, labels_T.clamp_min(0).unsqueeze(1)).squeeze(1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(log_p_TV == -INF, 0)).sum(1)
    return torch.where(kept_T == 1, logprob_T, 0), entropy_T * kept_T


def exact_for_gradients(logits_TV: Tensor, labels_T: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """In fp64 with large finite logits for -inf, whose autograd through logsumexp would otherwise be NaN; the same gradient."""
    shift = 1e9 * (1 + logits_TV.detach().masked_fill(logits_TV == -INF, 0).abs().max())
    finite_TV = torch.where(logits_TV == -INF, -shift, logits_TV)
    return reference.logprob_entropy(finite_TV, labels_T, temperature)


def gradient(function: Callable, logits_TV: Tensor, labels_T: Tensor, temperature, d_logprob_T, d_entropy_T) -> Tensor:
    """The gradient by the logits, on the CPU, for gradients that arrive."""
    leaf_TV = logits_TV.detach().requires_grad_()
    outputs = function(leaf_TV, labels_T, temperature)
    torch.autograd.backward(outputs, tuple(d.to(outputs[0]) for d in (d_logprob_T, d_entropy_T)))
    return leaf_TV.grad.cpu()


def error(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact|, 0 where both are the same infinity."""
    return torch.where(got.double() == exact, 0, (got.double() - exact).abs())


def with_layout(logits_TV: Tensor, layout: str) -> Tensor:
    """The same numbers, otherwise in memory: column-major, or as columns 3 … of rows that are NaN elsewhere."""
    rows, vocabulary = logits_TV.shape
    if layout == "columns":
        return logits_TV.t().contiguous().t()
    if layout == "rows":
        wide = logits_TV.new_full((rows, vocabulary + 5), float("nan"))
        wide[:, 3 : 3 + vocabulary] = logits_TV
        return wide[:, 3 : 3 + vocabulary]
    return logits_TV


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """(logits_TV, labels_T, temperature, d_logprob_T, d_entropy_T). The label's logit and one other of each row are finite.

    All follows from one seed: drawn one by one, every fourth vocabulary would have a single word.
    """
    seed = draw(st.integers(0, 2**40))
    generator, choice = torch.Generator().manual_seed(seed), random.Random(seed).choice
    rows = choice([1, 2, 3])
    vocabulary = choice([choice(range(1, 70)), choice(SIZES), choice(SIZES)])
    noise_TV = torch.randn(rows, vocabulary, generator=generator)
    labels_T = torch.randint(0, vocabulary, (rows,), generator=generator)
    label_T1 = labels_T.unsqueeze(1)
    kind = choice(["normal", "normal", "±1e4", "certain"])
    if kind == "normal":
        logits_TV = noise_TV * choice([0.0, 1e-4, 1.0, 4.0, 30.0, 1e3, 1e5])
    elif kind == "±1e4":
        logits_TV = noise_TV.sign() * 1e4 + noise_TV
    else:
        top_T1 = noise_TV.amax(1, keepdim=True) + choice([15.0, 25.0, 60.0])
        logits_TV = noise_TV.scatter(1, label_T1, top_T1)
    logits_TV = logits_TV + choice([0.0, 0.0, 50.0, -3e3])
    columns = torch.arange(vocabulary)
    masked_TV = {
        "none": torch.zeros(rows, vocabulary),
        "scattered": torch.rand(rows, vocabulary, generator=generator) < 0.5,
        "head": (columns < vocabulary * 2 // 3).expand(rows, -1),
        "tail": (columns > vocabulary // 3).expand(rows, -1),
        "all but two": torch.ones(rows, vocabulary),
    }[choice(["none", "none", "scattered", "head", "tail", "all but two"])].bool()
    kept_T2 = torch.cat((label_T1, (label_T1 * 7 + 1) % vocabulary), 1)
    logits_TV = torch.where(masked_TV.scatter(1, kept_T2, False), -INF, logits_TV)
    labels_T = torch.where(torch.rand(rows, generator=generator) < 0.15, reference.IGNORE, labels_T)
    temperature = choice([1.0, 0.6, 0.7, 1.3, 0.01, 20.0, "per row"])
    if temperature == "per row":
        temperature = torch.rand(rows, generator=generator) * 2 + 0.05
    dtype = choice([torch.float32, torch.bfloat16, torch.float16])
    if dtype == torch.float16:
        logits_TV = torch.where(logits_TV == -INF, -INF, logits_TV.clamp(-6e4, 6e4))
    layout = choice(["plain", "rows", "columns"])
    d_logprob_T, d_entropy_T = torch.randn(2, rows, generator=generator)
    return with_layout(logits_TV.to(dtype), layout), labels_T, temperature, d_logprob_T, d_entropy_T
