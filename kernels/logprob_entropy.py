"""Log-probability of each label and entropy of each row of logits, in one read; their gradient in one read and one write.

With z = logits / temperature, M the row's largest logit, a_j = (x_j - M) / temperature and S = sum_j exp(a_j):

    p_j = exp(a_j) / S        mean = sum_j p_j a_j        log p_j + H = a_j - mean
    d x_j = (d_logprob · ([j = y] - p_j) - d_entropy · p_j (a_j - mean)) / temperature

which are `reference.logprob_entropy`'s formulas, written so that the backward needs (M, S, mean) of a row and no difference
of two large logarithms. For the label 1 - p_y is -expm1(log p_y), which does not cancel where p_y is near 1.

Three custom operations carry it (torch.ops.keju.logprob_entropy_forward, …_backward, …_backward_), so that torch.compile and fake
tensors see them. `backend.choose` picks what they run: triton_rows on CUDA, csrc/cpu/logprob_entropy* on a CPU, plain PyTorch
here for the rest.

Left out: a gradient by the temperature, and second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.backend import Backend, choose
from kernels.reference import IGNORE

Temperature = float | Tensor


def logprob_entropy(
    logits_TV: Tensor, labels_T: Tensor, temperature: Temperature = 1.0, *, inplace_backward: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row, both differentiable by the logits.

    logits_TV: [T, V] floating, rows of any stride; -inf is allowed as long as one logit of a row is finite. labels_T: [T]
    integer, in [0, V) or `reference.IGNORE`, whose rows give 0 and a zero gradient. temperature: positive, a scalar or [T]; it
    gets no gradient. inplace_backward: the backward writes the gradient over the logits, which saves [T, V] of memory. Nothing
    else may need the logits afterwards: autograd refuses a second backward through them. It has no effect under torch.compile,
    which plans memory itself.

    Returns (logprob_T, at most 0; entropy_T), [T] in nats, in fp32, or fp64 where the logits are fp64.
    Raises ValueError for a shape that does not fit and, on a CPU, for a label outside the vocabulary or a temperature that is not
    positive. On CUDA nothing waits for the device: there such a value stops it with an assertion that names the argument, which
    the next synchronisation raises. Formulas: this module's head.
    """
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    if inplace_backward:
        _check_writable(logits_TV)
    logprob_T, entropy_T, _ = _forward(*_checked(logits_TV, labels_T, temperature), inplace_backward)
    return logprob_T, entropy_T


def logprob_entropy_forward(logits_TV: Tensor, labels_T: Tensor, temperature: Temperature = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_T, entropy_T, saved_3T) of a chunk of logits, for a caller that arranges the backward itself.

    Inputs and errors as `logprob_entropy`'s. saved_3T: [3, T] of logprob_T's dtype, (M, S, mean) of each row (Triton's M is in
    its own unit); it and logprob_T are what `logprob_entropy_backward_`, run by the same backend, needs besides the logits.
    """
    return _forward(*_checked(logits_TV, labels_T, temperature), False)


def logprob_entropy_backward_(
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Temperature,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
) -> Tensor:
    """Overwrites logits_TV with the gradient by the logits, and returns it.

    The first three are what the forward was given, logprob_T and saved_3T what it returned; d_logprob_T and d_entropy_T: [T] of
    logprob_T's dtype, the gradients that arrive. Raises ValueError where the logits' column stride is not 1 or rows overlap.
    """
    _check_writable(logits_TV)
    logits_TV, labels_T, temperature = _checked(logits_TV, labels_T, temperature)
    _backward_(logits_TV, labels_T, temperature, logprob_T, saved_3T, d_logprob_T, d_entropy_T)
    return logits_TV


def _checked(logits_TV: Tensor, labels_T: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor, Tensor]:
    """The operations' arguments: logits with column stride 1, int64 labels, temperature as [1] or [T]."""
    if logits_TV.dim() != 2 or not logits_TV.is_floating_point():
        raise ValueError(f"logits_TV: expected [T, V] floating, got {list(logits_TV.shape)} {logits_TV.dtype}")
    rows, vocabulary = logits_TV.shape
    if labels_T.shape != (rows,) or labels_T.is_floating_point():
        raise ValueError(f"labels_T: expected [{rows}] integer, got {list(labels_T.shape)} {labels_T.dtype}")
    if vocabulary > 1 and logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    return logits_TV, labels_T.to(torch.int64), temperature_tensor(temperature, rows, logits_TV)


def temperature_tensor(temperature: Temperature, rows: int, like: Tensor) -> Tensor:
    """The temperature as [1] or [rows] on like's device, to which one number is brought. Raises ValueError for another shape, for
    rows on another device, or for a number that is not positive."""
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().reshape(-1)
        if temperature.shape[0] not in (1, rows):
            raise ValueError(f"temperature: expected a scalar or [{rows}], got {list(temperature.shape)}")
        if temperature.numel() > 1 and temperature.device != like.device:
            raise ValueError(f"temperature: lies on {temperature.device}, the rest on {like.device}; bring it there")
        return temperature.to(like.device)
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    # A GPU's kernels take it in fp32: converting it there would be fp64 work.
    dtype = torch.float32 if like.is_cuda and like.dtype != torch.float64 else torch.float64
    return torch.full((1,), temperature, dtype=dtype, device=like.device)


def _check_writable(logits_TV: Tensor) -> None:
    """A column copy would leave the caller's logits as they were; overlapping rows would be written twice."""
    rows, vocabulary = logits_TV.shape
    if (vocabulary > 1 and logits_TV.stride(1) != 1) or (rows > 1 and logits_TV.stride(0) < vocabulary):
        raise ValueError(
            f"logits_TV: to be overwritten it needs column stride 1 and separate rows, has strides {logits_TV.stride()}"
        )


def backend_of(tensor: Tensor) -> Backend:
    """What a tensor's operations run with."""
    return choose(tensor.device.type, str(tensor.dtype).removeprefix("torch."))


@torch.library.custom_op("keju::logprob_entropy_forward", mutates_args=())
def _forward(
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    inplace_backward: bool,  # noqa: ARG001  (for `_setup_context` alone)
) -> tuple[Tensor, Tensor, Tensor]:
    backend = backend_of(logits_TV)
    if backend == "triton":
        from kernels import triton_rows

        return triton_rows.forward(logits_TV, labels_T, temperature.float())
    if backend == "native":
        return torch.ops.keju.logprob_entropy_forward_native(logits_TV, labels_T, temperature)
    if backend == "cuda":
        return torch.ops.keju.logprob_entropy_forward_cuda(logits_TV, labels_T, temperature.float())
    return _plain_forward(logits_TV, labels_T, temperature)


@torch.library.custom_op("keju::logprob_entropy_backward", mutates_args=())
def _backward(
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
) -> Tensor:
    if backend_of(logits_TV) == "native":
        d_logits_TV = torch.ops.keju.empty_reused(logits_TV.shape, logits_TV.dtype)
    else:
        d_logits_TV = torch.empty(logits_TV.shape, dtype=logits_TV.dtype, device=logits_TV.device)
    _write_backward(logits_TV, labels_T, temperature, logprob_T, saved_3T, d_logprob_T, d_entropy_T, d_logits_TV)
    return d_logits_TV


@torch.library.custom_op("keju::logprob_entropy_backward_", mutates_args=("logits_TV",))
def _backward_(
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
) -> None:
    _write_backward(logits_TV, labels_T, temperature, logprob_T, saved_3T, d_logprob_T, d_entropy_T, logits_TV)


@_forward.register_fake
def _(logits_TV: Tensor, *_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits_TV.shape[0]
    dtype = torch.promote_types(logits_TV.dtype, torch.float32)
    return tuple(torch.empty(shape, dtype=dtype, device=logits_TV.device) for shape in ((rows,), (rows,), (3, rows)))


@_backward.register_fake
def _(logits_TV: Tensor, *_rest: Tensor) -> Tensor:
    return torch.empty(logits_TV.shape, dtype=logits_TV.dtype, device=logits_TV.device)


@_backward_.register_fake
def _(*_all: Tensor) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_TV, labels_T, temperature, ctx.inplace_backward = inputs
    logprob_T, _, saved_3T = output
    ctx.mark_non_differentiable(saved_3T)
    ctx.save_for_backward(logits_TV, labels_T, temperature, logprob_T, saved_3T)


def _autograd_backward(ctx: Any, d_logprob_T: Tensor, d_entropy_T: Tensor, _d_saved: Tensor) -> tuple:
    arguments = (*ctx.saved_tensors, d_logprob_T, d_entropy_T)
    if not ctx.inplace_backward:
        return _backward(*arguments), None, None, None
    _backward_(*arguments)
    return arguments[0], None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _write_backward(
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
    d_logits_TV: Tensor,
) -> None:
    backend, others = backend_of(logits_TV), (logprob_T, saved_3T, d_logprob_T, d_entropy_T)
    if backend == "triton":
        from kernels import triton_rows

        triton_rows.backward(logits_TV, labels_T, temperature.float(), *others, d_logits_TV)
    elif backend == "native":
        torch.ops.keju.logprob_entropy_backward_native(logits_TV, labels_T, temperature, *others, d_logits_TV)
    elif backend == "cuda":
        torch.ops.keju.logprob_entropy_backward_cuda(logits_TV, labels_T, temperature.float(), *others, d_logits_TV)
    else:
        d_logits_TV.copy_(_plain_backward(logits_TV, labels_T, temperature, *others))


def _plain_forward(logits_TV: Tensor, labels_T: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if temperature.is_cpu and not bool((temperature > 0).all()):
        raise ValueError(f"temperature: expected positive numbers, got {temperature.tolist()}")
    maximum_T = logits_TV.amax(1).to(torch.promote_types(logits_TV.dtype, torch.float32))
    # A shift changes neither result, but in fp32 logarithms of sums far from 0 are coarse.
    logprob_T, entropy_T = reference.logprob_entropy(logits_TV - maximum_T.unsqueeze(1), labels_T, temperature)
    a_TV, e_TV = _exponents(logits_TV, temperature, maximum_T)
    sum_T = e_TV.sum(1)
    return logprob_T, entropy_T, torch.stack((maximum_T, sum_T, (e_TV * a_TV).sum(1) / sum_T))


def _plain_backward(
    logits_TV: Tensor,
    labels_T: Tensor,
    temperature: Tensor,
    logprob_T: Tensor,
    saved_3T: Tensor,
    d_logprob_T: Tensor,
    d_entropy_T: Tensor,
) -> Tensor:
    maximum_T, sum_T, mean_T = saved_3T
    ignored_T = labels_T == IGNORE
    label_T1 = labels_T.masked_fill(ignored_T, 0).unsqueeze(1)
    a_TV, e_TV = _exponents(logits_TV, temperature, maximum_T)
    d_entropy_part_TV = (e_TV / sum_T.unsqueeze(1)) * (a_TV - mean_T.unsqueeze(1)) * d_entropy_T.unsqueeze(1)
    d_z_TV = -(e_TV / sum_T.unsqueeze(1)) * d_logprob_T.unsqueeze(1) - d_entropy_part_TV
    label_part_T1 = -torch.expm1(logprob_T).unsqueeze(1) * d_logprob_T.unsqueeze(1) - d_entropy_part_TV.gather(1, label_T1)
    d_z_TV.scatter_(1, label_T1, label_part_T1)
    d_x_TV = d_z_TV / temperature.to(d_z_TV.dtype).unsqueeze(1)
    return d_x_TV.masked_fill(ignored_T.unsqueeze(1), 0)


def _exponents(logits_TV: Tensor, temperature: Tensor, maximum_T: Tensor) -> tuple[Tensor, Tensor]:
    """a_TV and exp(a_TV); a is 0 where exp(a) is, so that their products are 0 there, not NaN."""
    a_TV = (logits_TV.to(maximum_T.dtype) - maximum_T.unsqueeze(1)) / temperature.to(maximum_T.dtype).unsqueeze(1)
    e_TV = a_TV.exp()
    return a_TV.masked_fill(e_TV == 0, 0), e_TV
