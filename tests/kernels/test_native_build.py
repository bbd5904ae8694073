"""setup.py without a C++ compiler: one line and code 2, before anything is compiled. And what it asks of nvcc."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"CXX": "/nonexistent/c++"}, "CXX=/nonexistent/c++ does not exist"),
        ({"PATH": "/nonexistent"}, "none of c++, g++ and clang++ is on PATH"),
    ],
)
def test_missing_compiler_is_one_line_and_code_2(tmp_path, changed, named):
    environment = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")} | changed
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path / "temp"),
        "--build-lib",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("keju: ")]
    assert len(lines) == 1, done.stderr
    assert named in lines[0]
    assert done.stderr.endswith(lines[0] + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("known", "code"),
    [
        ("sm_75 sm_80 sm_90 sm_120", ["sm_80", "sm_90a", "compute_80"]),
        ("sm_75 sm_80", ["sm_80", "compute_80"]),
        ("sm_90 sm_100", ["sm_90a", "compute_90a"]),
        ("sm_100", None),
    ],
)
def test_cuda_sources_are_built_for_the_targets_nvcc_knows(tmp_path, monkeypatch, capsys, known, code):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {known}\n")
    nvcc.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_arguments: None)
    nvcc_flags = runpy.run_path("setup.py")["nvcc_flags"]
    if code is None:
        with pytest.raises(SystemExit):
            nvcc_flags(nvcc)
        assert "compiles for none of sm_80, sm_90" in capsys.readouterr().err
    else:
        assert [flag.rsplit("code=")[-1] for flag in nvcc_flags(nvcc) if flag.startswith("-gencode")] == code


@pytest.mark.parametrize(
    ("said", "torch_cuda", "built"), [("12.4", "12.8", True), ("12.4", "13.0", False), ("13.0", "13.0", True)]
)
def test_another_cudas_compiler_leaves_the_cuda_sources_out(tmp_path, monkeypatch, capsys, said, torch_cuda, built):
    """torch's build would end in a traceback, and the CPU kernels with it."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {said}, V{said}.131'\n")
    nvcc.chmod(0o755)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_arguments: None)
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    assert runpy.run_path("setup.py")["fits_torch"](nvcc) == built
    line = capsys.readouterr().err
    assert line == "" if built else line.startswith(f"keju: {nvcc} is of CUDA {said} and torch of {torch_cuda}: csrc/cuda")


def test_the_standard_that_the_sources_need_is_named(monkeypatch):
    """torch's own default was C++17 up to 2.11."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **_arguments: None)
    assert "-std=c++20" in runpy.run_path("setup.py")["CXX_FLAGS"]
