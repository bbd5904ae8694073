"""The static gate: the kernels' machine code for GPUs that need not be there.

Every Triton kernel is compiled for sm_90 as its launcher would launch it for 16,384 tokens and a vocabulary of 152,064
(`kernels.triton_launch.compile_only`), csrc/cuda for sm_80 and sm_90a where nvcc is; `sass` reads and judges them.
Must run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.kernels import report, sass
from benchmarks.kernels.inputs import CLIP_HIGH, CLIP_LOW

TOKENS, VOCABULARY = 16_384, 152_064
CHUNK = 4096
CUDA_TARGETS = ("80", "90a")
TORCH_FLAGS = ("-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-DNDEBUG")
HEADERS = ("kernel", "target", "registers", "stack", "shared", "loads in loops", "stores in loops", "fp64", "verdict")


@dataclass(frozen=True, slots=True)
class Checked:
    """One kernel: where from, for which target, what was found."""

    kernel: str
    target: str
    code: sass.Code
    faults: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    checked: tuple[Checked, ...]
    left_out: tuple[str, ...]
    """What was not checked, and why."""
    failed: tuple[str, ...] = ()
    """What should have been checked and could not be."""

    @property
    def held(self) -> bool:
        return bool(self.checked) and not self.failed and not any(one.faults for one in self.checked)

    @property
    def records(self) -> list[dict[str, object]]:
        return [asdict(one) for one in self.checked] + [{"left_out": reason} for reason in (*self.left_out, *self.failed)]

    @property
    def lines(self) -> list[str]:
        rows = [_row(one) for one in self.checked]
        broken = sum(bool(one.faults) for one in self.checked)
        count = (
            f"{broken} of {len(self.checked)} kernels break the static gate"
            if self.checked
            else "the static gate checked nothing"
        )
        left_out = [f"  left out: {reason}" for reason in self.left_out] + [f"  FAILED: {reason}" for reason in self.failed]
        return ["machine code", *report.table(HEADERS, rows), *left_out, count]


def check_all(root: Path) -> Report:
    """All kernels. csrc/cuda is left out, with the reason, where it cannot be compiled; the Triton kernels always can."""
    checked: list[Checked] = []
    left_out: list[str] = []
    failed: list[str] = []
    try:
        checked += check_triton()
    except LookupError as error:
        failed.append(f"Triton kernels: {error}")
    try:
        checked += check_cuda(root / "csrc" / "cuda")
    except LookupError as error:
        left_out.append(f"csrc/cuda: {error}")
    except ValueError as error:
        failed.append(f"csrc/cuda: {error}")
    return Report(tuple(checked), tuple(left_out), tuple(failed))


def check_triton() -> list[Checked]:
    """Raises LookupError where Triton or its disassembler is not there, or kernels are interpreted."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget

        from kernels.triton_launch import compile_only, is_interpreted
    except ImportError as error:
        raise LookupError(f"triton cannot be imported ({error})") from None
    if is_interpreted():
        raise LookupError("TRITON_INTERPRET is set, under which nothing is compiled")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        raise LookupError(f"{cuobjdump} is not there")
    checked = []
    for label, launch in _launches().items():
        with compile_only(GPUTarget("cuda", 90, 32)) as compiled:
            launch()
        for name, kernel in compiled:
            code = _disassemble(str(cuobjdump), kernel.asm["cubin"])
            wrong = [sass.faults(one, **_streams(name)) for one in code.values()]
            checked += [
                Checked(f"{name} {label}", "sm_90", one, tuple(bad)) for one, bad in zip(code.values(), wrong, strict=True)
            ]
    return checked


def _launches() -> dict[str, Callable[[], object]]:
    """The launchers' own calls on meta tensors, by what sets them apart."""
    from kernels import triton_policy, triton_rows

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels, temperature = empty(TOKENS, dtype=torch.int64), empty(1)
    per_token = [empty(TOKENS) for _ in range(4)]
    saved = empty(3, TOKENS)
    columns = (VOCABULARY + 63) // 64 * 64

    def backward(dtype: torch.dtype, d_dtype: torch.dtype) -> Callable[[], object]:
        logits = empty(TOKENS, columns, dtype=dtype)
        d_logits = (
            empty(TOKENS, VOCABULARY, dtype=d_dtype) if dtype == d_dtype else triton_rows.narrowed(logits, VOCABULARY, d_dtype)
        )
        arguments = (labels, temperature, per_token[0], saved, per_token[1], per_token[2], d_logits)
        return lambda: triton_rows.backward(logits[:, :VOCABULARY], *arguments)

    def rows(d_dtype: torch.dtype) -> Callable[[], object]:
        logits, parts = empty(CHUNK, columns), [empty(CHUNK) for _ in range(5)]
        d_logits = triton_rows.narrowed(logits, VOCABULARY, d_dtype)
        return lambda: triton_policy.policy_rows(
            logits[:, :VOCABULARY], empty(CHUNK, dtype=torch.int64), temperature, *parts[:3], CLIP_LOW, CLIP_HIGH, None, 0.0,
            1e-6, *parts[3:], d_logits,
        )  # fmt: skip

    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "bf16": lambda: triton_rows.forward(empty(TOKENS, VOCABULARY, dtype=bf16), labels, temperature),
        "fp32": lambda: triton_rows.forward(empty(TOKENS, VOCABULARY), labels, temperature),
        "bf16 to bf16": backward(bf16, bf16),
        "fp32 to fp32": backward(fp32, fp32),
        "fp32 narrowed to bf16": backward(fp32, bf16),
        "in place, bf16 gradient": rows(bf16),
        "in place, fp32 gradient": rows(fp32),
        "16,384 tokens": lambda: triton_policy.clipped_loss(*per_token, CLIP_LOW, CLIP_HIGH, None, 0.0),
        "fp32 gradient": lambda: triton_policy.scale_(empty(VOCABULARY, 5120), empty(1)),
        "bf16 gradient": lambda: triton_policy.scale_(empty(TOKENS, 5120, dtype=bf16), empty(1)),
    }


def _streams(kernel: str) -> dict[str, bool]:
    """What a kernel moves besides its scalars: forward kernels write only per-row numbers."""
    return {"reads": True, "writes": "forward" not in kernel}


def check_cuda(folder: Path) -> list[Checked]:
    """csrc/cuda/*.cu with nvcc. Raises LookupError where there are no sources, no nvcc or no cuobjdump, ValueError where a source
    does not compile."""
    sources = sorted(folder.glob("*.cu"))
    if not sources:
        raise LookupError("no sources")
    nvcc, cuobjdump = find_tool("nvcc"), find_tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        raise LookupError("nvcc or cuobjdump was not found")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    jobs = [(source, target) for source in sources for target in CUDA_TARGETS if f"sm_{target.rstrip('a')}" in known]
    with ThreadPoolExecutor() as pool:
        cubins = list(pool.map(lambda job: _nvcc(nvcc, *job), jobs))
    checked = []
    for (_, target), cubin in zip(jobs, cubins, strict=True):
        for name, code in _disassemble(cuobjdump, cubin).items():
            wrong = sass.faults(code, **_streams(name), edges=True)
            checked.append(Checked(_demangled(name), f"sm_{target}", code, tuple(wrong)))
    return checked


def _nvcc(nvcc: str, source: Path, target: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        code = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [nvcc, "-O3", "-std=c++17", code, *TORCH_FLAGS, "-cubin", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{source}: nvcc for sm_{target}: {done.stderr.strip()}")
        return cubin.read_bytes()


def _disassemble(cuobjdump: str, cubin: bytes) -> dict[str, sass.Code]:
    """Every kernel of a cubin by its name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (_output(cuobjdump, option, file.name) for option in ("-res-usage", "-sass"))
    return {name: sass.read(part, sass.resources(usage, name)) for name, part in _functions(text)}


def _functions(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), body


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def find_tool(name: str) -> str | None:
    """From PATH, from the toolkit's usual place, or from what Triton brings along."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    beside = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin" / name
    return found or (str(beside) if beside.exists() else None)


def _demangled(name: str) -> str:
    """Enough of it to tell the kernels apart."""
    short = re.search(r"(\w+?_kernel)I?(f|6__half|13__nv_bfloat16)?", re.sub(r"^_Z\w*?\d+(?=[a-z_]+_kernel)", "", name))
    dtypes = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", None: ""}
    return f"{short.group(1)} {dtypes[short.group(2)]} (CUDA)" if short else name


def _row(one: Checked) -> tuple[str, ...]:
    found, code = one.code.resources, one.code
    return (
        one.kernel,
        one.target,
        str(found.registers),
        f"{found.stack} B",
        f"{found.shared} B",
        _histogram(code.streamed_loads),
        _histogram(code.streamed_stores),
        str(code.fp64),
        "; ".join(one.faults) or "held",
    )


def _histogram(widths: dict[int, int]) -> str:
    return " ".join(f"{count}×{width}" for width, count in widths.items()) or "–"
