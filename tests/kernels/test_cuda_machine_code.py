"""What nvcc makes of csrc/cuda: a disassembly shows accesses of 16 bytes, no fp64, no spills, an exponential an element.

None of it needs a GPU. What the kernels compute is tests/kernels/test_cuda_sources.py's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CUDA_SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "logprob_entropy.cu"


def tool(name: str) -> str | None:
    """From PATH, the CUDA toolkit's usual place, or what Triton brings along."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None and name == "cuobjdump":
        beside = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin" / name
        found = str(beside) if beside.exists() else None
    return found


@pytest.fixture(scope="module", params=["80", "90a"])
def compiled(request, tmp_path_factory) -> tuple[str, dict[str, list[str]]]:
    """(ptxas' report, instructions of each kernel) with the flags that a build gives nvcc."""
    nvcc, cuobjdump = tool("nvcc"), tool("cuobjdump")
    if nvcc is None or cuobjdump is None:
        pytest.skip("nvcc or cuobjdump is not there")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=True).stdout.split()
    if f"sm_{request.param.rstrip('a')}" not in known:
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    cubin = tmp_path_factory.mktemp("cubin") / "logprob_entropy.cubin"
    flags = ["-O3", "-std=c++17", "-Xptxas", "-v", f"-gencode=arch=compute_{request.param},code=sm_{request.param}"]
    torch_flags = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    command = [nvcc, *flags, *torch_flags, "-DNDEBUG", "-cubin", "-o", str(cubin), str(CUDA_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    dump = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, timeout=60, check=True).stdout
    kernels = {}
    for part in dump.split("Function : ")[1:]:
        name = re.search(r"(forward|backward)_kernelI(f|6__half|13__nv_bfloat16)E", part)
        kernels["{} {}".format(*name.groups())] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", part)
    assert len(kernels) == 6
    return done.stderr, kernels


def test_registers_without_spills(compiled):
    report, kernels = compiled
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills == [("0", "0", "0")] * len(kernels)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(registers) == len(kernels)
    assert max(registers) <= 65536 // (2 * 512), "two blocks of 512 threads no longer fit on a multiprocessor"


def count(instructions: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, instruction)) for instruction in instructions)


def test_16_byte_accesses_and_no_fp64(compiled):
    for name, instructions in compiled[1].items():
        assert count(instructions, r"\bD(ADD|MUL|FMA|SETP|MNMX)|F64") == 0, name
        assert count(instructions, r"\b(LDL|STL)\b") == 0, name
        loads = [index for index, instruction in enumerate(instructions) if re.search(r"LDG\.E\.128", instruction)]
        assert len(loads) >= 4, name
        assert any(loads[i + 3] - loads[i] <= 8 for i in range(len(loads) - 3)), f"{name}: four loads in flight before a use"
        if name.startswith("backward"):
            assert count(instructions, r"STG\.E\.128") >= 8, name


def test_one_exponential_an_element_and_one_a_group(compiled):
    """The loop's 32 (16 for fp32) elements, one rescale; an edge element and its rescale, two rescales of the reduction."""
    for name, instructions in compiled[1].items():
        elements = 16 if name.endswith(" f") else 32
        exponentials = count(instructions, r"MUFU\.EX2")
        if name.startswith("forward"):
            assert exponentials <= elements + 1 + 4 + 10, name
        else:
            assert exponentials <= 2 * elements + 10, name


def test_the_label_check_stays_in_a_release_build(compiled):
    """Built with NDEBUG, as extensions are."""
    for name, instructions in compiled[1].items():
        assert count(instructions, r"\bCALL\.ABS") >= 1, name
