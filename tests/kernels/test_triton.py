"""What is Triton's alone: assertions on the device, the gradient narrowed in place, and what the compiler makes of the kernels.

On a GPU the first and the second run on it; elsewhere in the interpreter. The third compiles for a GPU that need not be there, in
a process of its own, because kernels that are interpreted here cannot be compiled here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import triton_interpreter
from kernel_paths import TRITON
from torch import Tensor

from kernels import triton_policy, triton_rows
from kernels.logprob_entropy import logprob_entropy

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(code: str, *, interpreted: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs Python with the repository and this folder on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "kernels")))
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


OUT_OF_RANGE = [
    ([0, 7], "1.0", "labels_T"),
    ([0, -1], "1.0", "labels_T"),
    ([-101, 0], "1.0", "labels_T"),
    ([0, 1], "torch.tensor([1.0, 0.0])", "temperature"),
    ([0, 1], "torch.tensor([-1.0])", "temperature"),
    ([0, -100], "torch.tensor([1.0, float('nan')])", "temperature"),
]


@pytest.mark.parametrize(("labels", "temperature", "named"), OUT_OF_RANGE)
def test_a_value_out_of_range_stops_the_device(labels, temperature, named):
    """An assertion that names the argument. On a GPU it ends the CUDA context, so a process of its own meets it."""
    if triton_interpreter.ON_GPU:
        done = in_a_process(f"""
            import torch
            from kernels.logprob_entropy import logprob_entropy
            temperature = {temperature}
            if isinstance(temperature, torch.Tensor):
                temperature = temperature.cuda()
            logprob_entropy(torch.zeros(2, 7, device="cuda"), torch.tensor({labels}, device="cuda"), temperature)
            torch.cuda.synchronize()
        """)
        assert done.returncode != 0
        assert named in done.stderr
        return
    values = eval(temperature, {"torch": torch})
    with TRITON.chosen(), pytest.raises(Exception, match=named) as caught:
        logprob_entropy(torch.zeros(2, 7), torch.tensor(labels), values)
    assert type(caught.value).__name__ == "InterpreterError"


def test_a_cpu_tensor_needs_the_interpreter():
    done = in_a_process("""
        import torch
        from kernels import backend
        from kernels.logprob_entropy import logprob_entropy
        with backend.use("triton"):
            logprob_entropy(torch.zeros(2, 7), torch.tensor([0, 1]))
    """)
    assert "ValueError: a Triton kernel needs a CUDA tensor, or TRITON_INTERPRET=1 for one on the cpu" in done.stderr


def rows_problem(columns: int, vocabulary: int) -> tuple[Tensor, ...]:
    """(buffer_TC of fp32 logits and 7 beyond them, labels_T, old logprob, advantage, weight); the third row takes no part."""
    generator = torch.Generator().manual_seed(vocabulary)
    buffer_TC = torch.full((4, columns), 7.0)
    buffer_TC[:, :vocabulary] = torch.randn(4, vocabulary, generator=generator) * 3
    labels_T = torch.tensor([0, vocabulary - 1, vocabulary // 2, vocabulary // 3])
    weight_T = torch.tensor([1.0, 0.5, 0.0, 2.0])
    return buffer_TC, labels_T, torch.full((4,), -1.0), torch.tensor([1.0, -1.0, 1.0, 2.0]), weight_T


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1, 60, 64, 2048, 2049, 4096, 4160, 6150, 8200])
def test_narrowing_in_place_gives_the_gradient_rounded_and_touches_nothing_else(vocabulary, dtype):
    """The pass over a chunk writes the fp32 gradient, rounded to nearest, where `narrowed` says; every other byte stays."""
    columns = (vocabulary + 63) // 64 * 64
    buffer_TC, *tokens = TRITON.place(rows_problem(columns, vocabulary))
    temperature = torch.full((1,), 0.8, device=TRITON.device)
    scalars = (0.2, 0.28, None, 0.0, 0.05)

    def run(logits_TV: Tensor, d_logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        values_2T = torch.empty(2, 4, device=TRITON.device)
        triton_policy.policy_rows(logits_TV, tokens[0], temperature, *tokens[1:], *scalars, *values_2T, d_logits_TV)
        return values_2T, d_logits_TV

    apart_values_2T, apart_TV = run(buffer_TC[:, :vocabulary], torch.empty(4, vocabulary, device=TRITON.device))
    before = buffer_TC.clone()
    inside_TV = triton_rows.narrowed(buffer_TC, vocabulary, dtype)
    values_2T, _ = run(buffer_TC[:, :vocabulary], inside_TV)
    assert torch.equal(values_2T, apart_values_2T)
    assert torch.equal(inside_TV, apart_TV.to(dtype))
    assert (inside_TV[2] == 0).all()
    bytes_TB, before_TB = (tensor.view(torch.uint8).view(4, -1) for tensor in (buffer_TC, before))
    start = 0 if dtype == torch.float32 else columns * 2
    end = start + vocabulary * dtype.itemsize
    assert torch.equal(bytes_TB[:, :start], before_TB[:, :start])
    assert torch.equal(bytes_TB[:, end:], before_TB[:, end:])


@pytest.mark.parametrize("warps", [4, 16])
@pytest.mark.parametrize("vectors", [1, 4])
def test_another_tile_gives_the_same_numbers(warps, vectors):
    """Sums in another order: the same within rounding, and each tile's own bits again and again."""
    generator = torch.Generator().manual_seed(0)
    logits_TV = (torch.randn(2, 10_000, generator=generator) * 4).bfloat16()
    logits_TV, labels_T = TRITON.place((logits_TV, torch.tensor([3, 9_999])))
    one = torch.ones(1, device=TRITON.device)
    shape = triton_rows.tile_shape(torch.bfloat16, warps, vectors)
    usual = triton_rows.forward(logits_TV, labels_T, one)
    outcomes = [triton_rows.forward(logits_TV, labels_T, one, **shape) for _ in range(2)]
    for first, second, want in zip(*outcomes, usual, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, want, rtol=1e-6, atol=1e-6)
    d_logits = [torch.empty_like(logits_TV) for _ in range(2)]
    ones_T = torch.ones(2, device=TRITON.device)
    for out, saved, options in ((d_logits[0], usual, {}), (d_logits[1], outcomes[0], shape)):
        triton_rows.backward(logits_TV, labels_T, one, saved[0], saved[2], ones_T, ones_T, out, **options)
    torch.testing.assert_close(*d_logits, rtol=2**-7, atol=1e-8)


COMPILED = """
    import json, re, torch
    from triton.backends.compiler import GPUTarget
    from kernels import triton_launch, triton_policy, triton_rows
    from kernels.triton_rows import narrowed
    MOST = 152064
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")
    with triton_launch.compile_only(GPUTarget("cuda", 90, 32)) as compiled:
        for tokens in (1, 2, 7, 16, 1000, 16384, 65536, 70001):
            labels, one, each = meta(tokens, dtype=torch.long), meta(1), meta(tokens)
            logits = meta(tokens, MOST, dtype=torch.bfloat16)
            logprob, entropy, saved = triton_rows.forward(logits, labels, one)
            triton_rows.backward(logits, labels, one, logprob, saved, each, each, logits)
            triton_policy.clipped_loss(each, each, each, each, 0.2, 0.28, None, 0.0)
            triton_policy.clipped_loss(each, each, each, each, 0.2, 0.2, None, 0.1)
            buffer, scalars = meta(tokens, MOST), (0.2, 0.28, None, 0.0, 0.01)
            d_logits = narrowed(buffer, MOST, torch.bfloat16)
            triton_policy.policy_rows(buffer, labels, one, each, each, each, *scalars, each, each, d_logits)
            triton_policy.scale_(meta(tokens * 5120, dtype=torch.bfloat16), one)
    found = {}
    for name, kernel in compiled:
        ptx = kernel.asm["ptx"]
        found.setdefault(name, {})[kernel.hash] = {
            "wide": len(re.findall(r"ld\\.global[.\\w]*\\.v4\\.b32", ptx)), "spills": int(".local" in ptx),
            "doubles": len(re.findall(r"\\.f64", ptx)), "assertions": ptx.count("__assertfail"),
        }
    print(json.dumps({name: list(variants.values()) for name, variants in found.items()}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict[str, int]]]:
    """Each kernel's distinct machine programs for an H100 or H200, over eight numbers of tokens, with what they contain."""
    done = in_a_process(COMPILED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kernel_is_compiled_once_whatever_the_number_of_tokens(compiled):
    assert {name: len(variants) for name, variants in compiled.items()} == {
        "forward_kernel": 1,
        "backward_kernel": 1,
        "clipped_loss_kernel": 1,
        "policy_rows_kernel": 1,
        "scale_kernel": 1,
    }


def test_the_machine_code_is_as_meant(compiled):
    """Loads of 16 bytes, nothing in fp64, no memory of a thread's own, and assertions of what the host cannot check."""
    for name, (variant,) in compiled.items():
        assert variant["doubles"] == 0, name
        assert variant["spills"] == 0, name
        assert variant["wide"] > 0, name
        assert (variant["assertions"] > 0) == (name in ("forward_kernel", "backward_kernel", "policy_rows_kernel")), name
