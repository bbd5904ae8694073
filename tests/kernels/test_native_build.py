"""setup.py where there is no C++ compiler: one line that says so and code 2, before anything is compiled."""

from __future__ import annotations

import os
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
