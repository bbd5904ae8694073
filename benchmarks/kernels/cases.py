"""What is measured: an operation, a mode and a shape; the work its mathematics needs; and the grid, most important first."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FORWARD, BACKWARD, BOTH, BOTH_INPLACE = "forward", "backward", "forward+backward", "forward+backward in place"
TOKENWISE = {"clipped_policy_loss": 4 * (4 + 1 + 2)}
"""Operations of log-probabilities [T] in fp32 that end in one loss (`benchmarks.kernels.tokenwise`), and the fewest bytes a token
through memory, forward and backward. clipped_policy_loss reads four vectors and writes one, and its backward scales that one."""
OPERATIONS: dict[str, tuple[str, ...]] = {
    "logprob_entropy": (FORWARD, BACKWARD, BOTH, BOTH_INPLACE),
    "linear_logprob_entropy": (FORWARD, BOTH),
    **dict.fromkeys(TOKENWISE, (BOTH,)),
    "linear_policy_loss": (BOTH,),
    "policy_loss_from_logits": (BOTH, BOTH_INPLACE),
    "repetition": (FORWARD,),
}
"""Operations and their modes. policy_loss_from_logits is logprob_entropy and clipped_policy_loss, one after the other."""
GEMMS = {
    ("linear_logprob_entropy", FORWARD): 1,
    ("linear_logprob_entropy", BOTH): 3,
    ("linear_policy_loss", BOTH): 3,
}
"""GEMMs of 2·T·V·D operations each that the mathematics needs. Who does not keep all logits of linear_logprob_entropy until the
gradient arrives forms the others twice: up to one more."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the grid. tokens T, vocabulary V, hidden D: 0 where the operation has none. dtype: torch's name."""

    operation: str
    mode: str
    tokens: int
    vocabulary: int = 0
    hidden: int = 0
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        sizes = ((self.tokens, "T"), (self.vocabulary, "V"), (self.hidden, "D"))
        shape = " ".join(f"{letter}={value}" for value, letter in sizes if value)
        return f"{self.operation} {self.mode} {shape} {self.dtype}"

    @property
    def is_linear(self) -> bool:
        return self.operation.startswith("linear")

    @property
    def takes_logits(self) -> bool:
        return self.operation in ("logprob_entropy", "policy_loss_from_logits")

    @property
    def is_tokenwise(self) -> bool:
        return self.operation in TOKENWISE

    @property
    def with_gradient(self) -> bool:
        return self.mode != FORWARD

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def item_bytes(self) -> int:
        return self.torch_dtype.itemsize

    def workload(self) -> Case:
        """The case whose inputs it shares: the same operation and shape, whatever the mode."""
        return replace(self, mode="")


def bytes_to_move(case: Case) -> int | None:
    """Fewest bytes through memory; None where arithmetic is the floor (linear) or where it is no matter of memory (repetition).

    Logits of b bytes an element, per-token values of 4 (labels of 8): forward reads T·V·b; backward reads and writes T·V·b, in
    place or not; both, 3·T·V·b.
    """
    tokens, table = case.tokens, case.tokens * case.vocabulary * case.item_bytes
    if case.is_tokenwise:
        return tokens * TOKENWISE[case.operation]
    if not case.takes_logits:
        return None
    per_token = {FORWARD: 8 + 2 * 4, BACKWARD: 8 + 6 * 4}
    passes = {FORWARD: 1, BACKWARD: 2}.get(case.mode, 3)
    return passes * table + tokens * per_token.get(case.mode, sum(per_token.values()))


def operations_to_do(case: Case) -> int | None:
    """Floating-point operations of the GEMMs that the mathematics needs: GEMMS · 2·T·V·D; None where there is no GEMM."""
    gemms = GEMMS.get((case.operation, case.mode))
    return None if gemms is None else gemms * 2 * case.tokens * case.vocabulary * case.hidden


def input_bytes(case: Case) -> int:
    """Bytes of the large inputs."""
    elements = case.tokens * case.vocabulary if case.takes_logits else (case.tokens + case.vocabulary) * case.hidden
    return elements * case.item_bytes


def gradient_bytes(case: Case) -> int:
    """Bytes of the gradients that are returned, in the inputs' dtype."""
    return input_bytes(case) if case.with_gradient else 0


def check(case: Case) -> str | None:
    """Why there is no such case; None where there is."""
    if case.operation not in OPERATIONS:
        return f"operation: {case.operation!r} is none of {', '.join(OPERATIONS)}"
    if case.mode not in OPERATIONS[case.operation]:
        return f"mode: {case.operation} has {', '.join(OPERATIONS[case.operation])}, not {case.mode!r}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"dtype: expected bfloat16 or float32, got {case.dtype!r}"
    wanted = {"tokens": True, "vocabulary": case.takes_logits or case.is_linear, "hidden": case.is_linear}
    for field, needed in wanted.items():
        if (getattr(case, field) > 0) != needed:
            return f"{field}: {case.operation} needs {'a positive number' if needed else 'none'}, got {getattr(case, field)}"
    return None


TOKENS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
QWEN, LLAMA, SMALL = 152_064, 128_256, 32_000


def grid(effort: str, device: str) -> list[Case]:
    """The cases of an effort (quick, full) on a device type (cpu, cuda), most important first.

    A run ends when its time is up, so what matters most comes first: the shapes of the gates, then the sweep over T of the
    picture, then fp32, then the other vocabularies and the small model.
    """
    if device == "cpu":
        return _cpu_grid(effort)
    if effort == "quick":
        return [*_logits(1024, SMALL), *_linear(1024, SMALL, 896), *_tokenwise(16_384), _repetition()]
    cases = [*_logits(8192, QWEN), _policy(16_384), *_tokenwise(16_384), *_linear(16_384, QWEN, 5120)[:2]]
    for tokens in (4096, 8192):
        cases += [*_linear(tokens, QWEN, 5120), *_logits(tokens, QWEN)]
    for tokens in (16_384, 2048, 1024, 512, 32_768, 65_536):
        cases += [*_logits(tokens, QWEN), *_linear(tokens, QWEN, 5120), *_tokenwise(tokens)]
    cases += [*_logits(8192, QWEN, "float32"), _repetition()]
    for vocabulary in (LLAMA, SMALL):
        cases += [*_logits(8192, vocabulary), *_linear(8192, vocabulary, 5120)]
    cases += [*_linear(8192, QWEN, 896), *_linear(8192, SMALL, 896), *_linear(4096, SMALL, 896, "float32")]
    return list(dict.fromkeys(cases))


def _cpu_grid(effort: str) -> list[Case]:
    if effort == "quick":
        linear = [*_linear(64, SMALL, 896, "float32"), *_linear(64, 8192, 256)]
        return [*_logits(64, QWEN), _repetition(), *_tokenwise(16_384), *linear]
    cases = [
        *_logits(512, QWEN),
        _repetition(),
        *_tokenwise(16_384),
        *_linear(512, SMALL, 896, "float32"),
        *_linear(512, SMALL, 896),
    ]
    for tokens in (1024, 2048):
        cases += [*_logits(tokens, QWEN), *_linear(tokens, SMALL, 896, "float32"), *_tokenwise(tokens)]
    cases += [*_logits(512, QWEN, "float32"), *_logits(512, LLAMA), *_logits(512, SMALL), *_linear(512, QWEN, 896, "float32")]
    return list(dict.fromkeys([*cases, *_tokenwise(65_536)]))


def _logits(tokens: int, vocabulary: int, dtype: str = "bfloat16") -> list[Case]:
    modes = [("logprob_entropy", mode) for mode in OPERATIONS["logprob_entropy"]] + [("policy_loss_from_logits", BOTH)]
    return [Case(operation, mode, tokens, vocabulary, dtype=dtype) for operation, mode in modes]


def _linear(tokens: int, vocabulary: int, hidden: int, dtype: str = "bfloat16") -> list[Case]:
    head = Case("linear_logprob_entropy", FORWARD, tokens, vocabulary, hidden, dtype)
    return [head, replace(head, mode=BOTH), replace(head, operation="linear_policy_loss", mode=BOTH)]


def _policy(tokens: int) -> Case:
    return _linear(tokens, QWEN, 5120)[2]


def _tokenwise(tokens: int) -> list[Case]:
    return [Case(operation, BOTH, tokens, dtype="float32") for operation in TOKENWISE]


def _repetition() -> Case:
    return Case("repetition", FORWARD, 32_768, dtype="float32")
