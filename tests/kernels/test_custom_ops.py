"""The custom operations as PyTorch's machinery sees them: schema, fake tensors, autograd registration, torch.compile."""

from __future__ import annotations

import pytest
import torch
from head_problems import FIELDS, problem
from kernel_paths import Path
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_interpreter import ON_GPU

from kernels.clipped_policy_loss import clipped_policy_loss
from kernels.linear_logprob_entropy import linear_logprob_entropy
from kernels.linear_policy_loss import PolicyLossInputs, linear_policy_loss
from kernels.logprob_entropy import logprob_entropy

TOKENS, HIDDEN, VOCABULARY = 16384, 5120, 152064
BF16, FP32 = torch.bfloat16, torch.float32


def operations(dtype: torch.dtype) -> dict[str, tuple]:
    """Arguments of every operation, small."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(3, 40, generator=generator).to(dtype)
    labels_T, temperature = torch.tensor([0, 5, -100]), torch.ones(1, dtype=torch.float64)
    d_2T, values_T = torch.randn(2, 3, generator=generator), torch.full((3,), -1.0)
    saved_3T = torch.stack((torch.full((3,), 4.0), torch.full((3,), 2.0), torch.full((3,), -1.0)))
    hidden_TD, weight_VD, inputs = problem(dtype=dtype, shape=(3, 4, 9), entropy_weight=0.1, kl_coefficient=0.1)
    tokens = (inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T)
    labels = inputs.labels_T
    leaves = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
    detached = [tensor.detach() for tensor in leaves]
    row_backward = (labels_T, temperature, values_T, saved_3T, *d_2T)
    return {
        "logprob_entropy_forward": (logits_TV.clone().requires_grad_(), labels_T, temperature, False),
        "logprob_entropy_backward": (logits_TV, *row_backward),
        "logprob_entropy_backward_": (logits_TV.clone(), *row_backward),
        "clipped_policy_loss": (values_T.clone().requires_grad_(), *tokens, 0.2, 0.28, inputs.ref_logprob_T, 0.1),
        "linear_logprob_entropy": (*leaves, labels, temperature, dtype, False),
        "linear_logprob_entropy_backward": (*detached, labels, temperature, values_T, saved_3T, *d_2T, dtype),
        "linear_policy_loss": (*leaves, labels, temperature, *tokens, inputs.ref_logprob_T, 0.2, 0.28, 0.1, 0.1, True, dtype),
        "scale_": (logits_TV.clone(), torch.tensor(2.0)),
    }


@pytest.mark.parametrize("name", operations(FP32))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_opcheck(path: Path, name, dtype):
    """Schema, autograd registration, fake against real, and ahead-of-time dispatch with dynamic shapes.

    The last not for linear_policy_loss with gradients, whose backward scales outputs of the forward: where those are also outputs
    of the graph, as here and never in `linear_policy_loss`, the partitioner gives up. test_compiled_linear_policy_loss has it.
    """
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    placed = []
    for argument in operations(dtype)[name]:
        placed.append(path.place(argument))
        if isinstance(argument, Tensor) and argument.requires_grad:
            placed[-1].requires_grad_()
    operation = getattr(torch.ops.keju, name).default
    if name == "linear_policy_loss":
        torch.library.opcheck(operation, (placed[0].detach(), placed[1].detach(), *placed[2:-2], False, placed[-1]))
        checks.pop()
    if name == "linear_logprob_entropy":
        torch.library.opcheck(operation, (*placed[:-1], True), test_utils=checks[:-1])  # never kept where something is traced
    torch.library.opcheck(operation, tuple(placed), test_utils=checks)


def fake_inputs(device: str) -> PolicyLossInputs:
    def each() -> Tensor:
        return torch.empty(TOKENS, device=device)

    labels_T = torch.empty(TOKENS, dtype=torch.long, device=device)
    return PolicyLossInputs(labels_T, each(), each(), each(), 0.2, 0.28, 0.01, each(), 0.1, 0.7)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("grad_dtype", [BF16, FP32])
def test_fake_tensors_of_a_14b_model(device, grad_dtype):
    """16K tokens, a hidden size of 5120 and 152,064 words have the right shapes at once, forwards and backwards."""
    if device == "cuda" and not ON_GPU:
        pytest.skip("autograd asks for the device: on a GPU only; without gradients in the next test")
    with FakeTensorMode():
        hidden_TD = torch.empty(TOKENS, HIDDEN, dtype=BF16, device=device).requires_grad_()
        weight_VD = torch.empty(VOCABULARY, HIDDEN, dtype=BF16, device=device).requires_grad_()
        weight_VD.grad_dtype = grad_dtype
        inputs = fake_inputs(device)
        result = linear_policy_loss(hidden_TD, weight_VD, inputs)
        assert (result.loss.shape, result.loss.dtype, result.loss.device.type) == ((), FP32, device)
        assert result.logprob_T.shape == result.entropy_T.shape == (TOKENS,)
        assert {result.entropy_sum.shape, result.ratio_max.shape, result.kl_sum.shape} == {()}
        result.loss.backward()
        assert (hidden_TD.grad.shape, hidden_TD.grad.dtype) == ((TOKENS, HIDDEN), BF16)
        assert (weight_VD.grad.shape, weight_VD.grad.dtype) == ((VOCABULARY, HIDDEN), grad_dtype)

        hidden_TD.grad = weight_VD.grad = None
        values = linear_logprob_entropy(hidden_TD, weight_VD, inputs.labels_T, 0.7)
        assert [(tuple(value.shape), value.dtype) for value in values] == [((TOKENS,), FP32)] * 2
        (values[0].sum() + values[1].sum()).backward()
        assert (weight_VD.grad.shape, weight_VD.grad.dtype) == ((VOCABULARY, HIDDEN), grad_dtype)

        logits_TV = torch.empty(TOKENS, VOCABULARY, dtype=BF16, device=device).requires_grad_()
        for inplace in (False, True):
            values = logprob_entropy(logits_TV * 1, inputs.labels_T, 0.7, inplace_backward=inplace)
            assert [(tuple(value.shape), value.dtype) for value in values] == [((TOKENS,), FP32)] * 2
            values[0].sum().backward()
        assert (logits_TV.grad.shape, logits_TV.grad.dtype) == ((TOKENS, VOCABULARY), BF16)

        logprob_T = torch.empty(TOKENS, device=device).requires_grad_()
        clipped = clipped_policy_loss(logprob_T, *(torch.empty(TOKENS, device=device),) * 3, clip_low=0.2, clip_high=0.2)
        assert [tuple(field.shape) for field in clipped] == [()] * 7 + [(TOKENS,)]
        clipped.loss.backward()
        assert logprob_T.grad.shape == (TOKENS,)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_without_a_device(device):
    """Values, and the gradients that linear_policy_loss forms in its forward, of tensors on a GPU that need not be there."""
    with FakeTensorMode(), torch.no_grad():
        hidden_TD = torch.empty(TOKENS, HIDDEN, dtype=BF16, device=device)
        weight_VD = torch.empty(VOCABULARY, HIDDEN, dtype=BF16, device=device)
        inputs = fake_inputs(device)
        assert linear_policy_loss(hidden_TD, weight_VD, inputs).entropy_T.shape == (TOKENS,)
        assert linear_logprob_entropy(hidden_TD, weight_VD, inputs.labels_T, 0.7)[0].shape == (TOKENS,)
        each = (inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T, inputs.ref_logprob_T)
        temperature = torch.ones(1, device=device)
        results = torch.ops.keju.linear_policy_loss(
            hidden_TD, weight_VD, inputs.labels_T, temperature, *each, 0.2, 0.28, 0.1, 0.01, True, FP32
        )
        shapes = [(), (8,), (TOKENS,), (TOKENS,), (TOKENS, HIDDEN), (VOCABULARY, HIDDEN)]
        assert [tuple(result.shape) for result in results] == shapes
        assert [result.dtype for result in results] == [FP32, FP32, FP32, FP32, BF16, FP32]
        assert {result.device.type for result in results} == {device}


def compiled_and_eager(function, *leaves: Tensor, dynamic: bool | None = None) -> None:
    """Asserts the same bits, values and gradients, with and without the compiler."""
    outcomes = []
    torch._dynamo.reset()
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)):
        values = run(*leaves)
        gradients = torch.autograd.grad(values[0], leaves)
        outcomes.append([value.detach() for value in (*values, *gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiled_logprob_entropy(path: Path, inplace_backward):
    logits_TV = path.place(torch.randn(3, 40, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels_T = path.place(torch.tensor([0, 5, -100]))

    def function(logits_TV: Tensor) -> tuple[Tensor, ...]:
        logprob_T, entropy_T = logprob_entropy(logits_TV * 2, labels_T, 0.7, inplace_backward=inplace_backward)
        return (logprob_T + 0.5 * entropy_T).sum(), logprob_T, entropy_T

    compiled_and_eager(function, logits_TV)


def test_compiled_clipped_policy_loss(path: Path):
    logprob_T, *others = path.place(tuple(torch.randn(4, 20, generator=torch.Generator().manual_seed(1))))

    def function(logprob_T: Tensor) -> tuple[Tensor, ...]:
        return tuple(clipped_policy_loss(logprob_T * 2, *others, clip_low=0.2, clip_high=0.28))

    compiled_and_eager(function, logprob_T.requires_grad_())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled_linear_logprob_entropy(path: Path, dtype):
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=dtype)))

    def function(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        logprob_T, entropy_T = linear_logprob_entropy(hidden_TD * 2, weight_VD, inputs.labels_T, 0.7)
        return (logprob_T + 0.5 * entropy_T).sum(), logprob_T, entropy_T

    compiled_and_eager(function, hidden_TD.requires_grad_(), weight_VD.requires_grad_())


@pytest.mark.parametrize(("name", "dynamic"), [("policy alone", None), ("reference", True), ("no reference", False)])
def test_compiled_linear_policy_loss(path: Path, name, dynamic):
    hidden_TD, weight_VD, inputs = path.place(tuple(problem(dtype=BF16, **FIELDS[name])))

    def function(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, ...]:
        result = linear_policy_loss(hidden_TD * 2, weight_VD, inputs)
        return 3 * result.loss, result.logprob_T, result.entropy_sum, result.clipped_low, result.ratio_max

    compiled_and_eager(function, hidden_TD.requires_grad_(), weight_VD.requires_grad_(), dynamic=dynamic)
