"""Builds `kernels._native` (csrc/) with torch's C++ extension tools. Metadata is in pyproject.toml.

    pip install --no-build-isolation --no-deps -e .        or        python setup.py build_ext --inplace

The CPU row kernels are compiled once for each instruction set, with that set's flags and no other file's; which one runs is
decided at run time (csrc/cpu/capability.cpp), so a build serves any x86-64 machine. CUDA sources, which run on request alone,
join where torch has CUDA and an nvcc of its major version is found, compiled for those of CUDA_TARGETS that this nvcc knows,
whatever GPU is in the machine. Exits with code 2 and one line on stderr where there is no torch or no C++ compiler.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, setup

CSRC = Path("csrc")
X86 = platform.machine().lower() in ("x86_64", "amd64")
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
ISA_FLAGS = {"baseline": []}
"""Flags of csrc/cpu/*_<instruction set>.cpp, on top of CXX_FLAGS."""
if X86:
    CXX_FLAGS.append("-DKEJU_X86")
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    # GCC 12 takes the undefined operands inside its own AVX-512 header for mistakes.
    quiet = ["-Wno-unknown-warning-option", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", *quiet]
CUDA_TARGETS = {"80": "sm_80", "90a": "sm_90"}
"""Architectures that CUDA sources are compiled for, and the name under which `nvcc --list-gpu-code` knows each."""


def fail(line: str) -> None:
    """One line, no traceback."""
    print(f"keju: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    fail(
        f"the native kernels need torch at build time ({error}); install torch first, then pip install --no-build-isolation -e ."
    )


def find_compiler() -> None:
    """Makes sure of a C++ compiler before torch looks for one, and has every later step (compile, link) use the same."""
    named = os.environ.get("CXX")
    candidates = [named] if named else ["c++", "g++", "clang++"]
    found = next((name for name in candidates if shutil.which(shlex.split(name)[0])), None)
    if found is None:
        sought = f"CXX={named} does not exist" if named else "none of c++, g++ and clang++ is on PATH"
        fail(f"no C++ compiler: {sought}; install one (Debian: apt-get install g++) or set CXX to one")
    os.environ["CXX"] = found
    # setuptools links with CC's driver or CXX's, whichever it chooses; where the C one is missing the C++ one serves.
    if "CC" not in os.environ and not (shutil.which("cc") and shutil.which("gcc")):
        os.environ["CC"] = found


class Build(BuildExtension):
    """BuildExtension gives all sources of an extension the same flags; those of an instruction set are compiled before, apart."""

    def build_extensions(self) -> None:
        find_compiler()
        if self.editable_mode:
            # pip gives an editable build a fresh temporary folder, in which nothing could be reused.
            self.build_temp = f"build/temp.{get_platform()}-{sys.implementation.cache_tag}"
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        for isa, flags in ISA_FLAGS.items():
            extension.extra_objects += self.compiler.compile(
                sorted(str(path) for path in (CSRC / "cpu").glob(f"*_{isa}.cpp")),
                output_dir=str(Path(self.build_temp) / isa),
                extra_postargs={"cxx": [*CXX_FLAGS, *flags], "nvcc": []},
                depends=extension.depends,
            )
        super().build_extension(extension)


def nvcc_flags(nvcc: Path) -> list[str]:
    """Machine code for each known target, and the lowest one's PTX, from which a driver makes code for GPUs newer than all."""
    listed = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [target for target, name in CUDA_TARGETS.items() if name in listed]
    if not targets:
        fail(f"{nvcc} compiles for none of {', '.join(CUDA_TARGETS.values())}; install a CUDA toolkit from 12.0 on")
    code = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    # Not -use_fast_math: the kernels name the approximate instructions that they want, and need the others exact.
    return ["-O3", "-std=c++17", *code, f"-gencode=arch=compute_{targets[0]},code=compute_{targets[0]}"]


def fits_torch(nvcc: Path) -> bool:
    """Whether CUDA sources can be built for this torch; one line on stderr where another CUDA's nvcc is in the way."""
    if torch.version.cuda is None or not nvcc.exists():
        return False
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is not None and found[1] == torch.version.cuda.partition(".")[0]:
        return True
    release = "an unknown CUDA" if found is None else f"CUDA {found[1]}.{found[2]}"
    print(
        f"keju: {nvcc} is of {release} and torch of {torch.version.cuda}: csrc/cuda, which runs on request alone, is left out; "
        "set CUDA_HOME to a toolkit of torch's to have it",
        file=sys.stderr,
        flush=True,
    )
    return False


def native_extension() -> Extension:
    per_isa = {path for isa in ("baseline", "avx2", "avx512") for path in CSRC.glob(f"cpu/*_{isa}.cpp")}
    sources = sorted(str(path) for path in CSRC.rglob("*.cpp") if path not in per_isa and path.parent.name != "cuda")
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    cuda_sources = sorted(str(path) for path in CSRC.glob("cuda/*") if path.suffix in (".cu", ".cpp"))
    with_cuda = bool(cuda_sources) and fits_torch(nvcc)
    make = CUDAExtension if with_cuda else CppExtension
    return make(
        "kernels._native",
        sources + (cuda_sources if with_cuda else []),
        depends=sorted(str(path) for path in CSRC.rglob("*.h")),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags(nvcc) if with_cuda else []},
        extra_link_args=["-fopenmp"],
    )


setup(ext_modules=[native_extension()], cmdclass={"build_ext": Build})
