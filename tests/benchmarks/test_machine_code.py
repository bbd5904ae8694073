"""The reader of disassemblies sees loops, widths, spills and doubles, and the static gate fails where it must."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.sass import Resources, faults, read, resources
from benchmarks.kernels.static import Checked, Report

CLEAN = Resources(registers=40, stack=0, shared=1024, local=0)


def sass(*instructions: str) -> str:
    return "\n".join(
        f"        /*{16 * place:04x}*/                   {text} ;  /* 0x0 */" for place, text in enumerate(instructions)
    )


LOOP = sass(
    "LDG.E R1, desc[UR4][R2.64]",  # 0x00, outside: a label
    "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",  # 0x10, the loop
    "STG.E.128 desc[UR4][R2.64], R4",
    "@P0 BRA 0x10",
    "STG.E desc[UR4][R2.64], R4",
    "EXIT",
    "BRA 0x60",  # the padding after the end
)


def test_a_loop_with_wide_accesses_holds_though_scalars_stand_outside():
    code = read(LOOP, CLEAN)
    assert (code.loops, code.loads, code.streamed_loads, code.streamed_stores) == (1, {32: 1, 128: 1}, {128: 1}, {128: 1})
    assert faults(code, reads=True, writes=True) == []


def test_a_jump_back_from_an_unlikely_block_is_no_loop():
    code = read(sass("@P0 BRA 0x40", "LDG.E R1, desc[UR4][R2.64]", "STG.E.128 [R2.64], R4", "EXIT", "NOP", "BRA 0x10"), CLEAN)
    assert code.loops == 0


def test_narrow_accesses_in_a_loop_are_found_unless_they_are_meant():
    code = read(LOOP.replace("LDG.E.128.CONSTANT", "LDG.E.64"), CLEAN)
    assert faults(code, reads=True, writes=True) == ["no 128-bit streamed loads: {64: 1}"]
    mixed = read(
        sass("LDG.E.128 R4, [R2.64]", "LDG.E.U16 R1, [R2.64]", "STG.E.128 [R2.64], R4", "@!P1 BRA `(0x0)", "EXIT"),
        CLEAN,
    )
    assert faults(mixed, reads=True, writes=True) == ["1 streamed loads narrower than 128 bits: {16: 1, 128: 1}"]
    assert faults(mixed, reads=True, writes=True, edges=True) == []


def test_spills_and_doubles_are_found():
    spilled = read(LOOP, Resources(255, 64, 0, 0))
    assert "64 B of stack" in faults(spilled, reads=True, writes=True)[0]
    local = read(LOOP + sass("STL [R1], R2"), CLEAN)
    assert "1 LDL and STL" in faults(local, reads=True, writes=True)[0]
    double = read(LOOP + sass("DFMA R2, R4, R6, R8", "F2F.F64.F32 R2, R3"), CLEAN)
    assert faults(double, reads=True, writes=True) == ["2 fp64 instructions"]


def test_resources_are_those_of_the_function():
    other = " Function other:\n  REG:9 STACK:8 SHARED:0 LOCAL:0\n"
    usage = other + " Function mine:\n  REG:48 STACK:0 SHARED:1024 LOCAL:4 CONSTANT[0]:700\n"
    assert resources(usage, "mine") == Resources(48, 0, 1024, 4)
    with pytest.raises(ValueError, match="theirs"):
        resources(usage, "theirs")


ROOT = Path(__file__).resolve().parents[2]


def check_static(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.kernels", "--static", "--device", "cpu", "--out", str(tmp_path)]
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


def test_the_projects_kernels_hold_the_static_gate(tmp_path):
    """In a process of its own: other tests have Triton interpret."""
    pytest.importorskip("triton")
    done = check_static(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward_kernel bf16" in done.stdout
    assert "0 of" in done.stdout.splitlines()[-1]


def test_a_static_gate_that_could_not_check_the_triton_kernels_fails(tmp_path):
    done = check_static(tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    assert "FAILED: Triton kernels: TRITON_INTERPRET is set" in done.stdout


def test_a_report_holds_only_where_something_was_checked_and_nothing_is_wrong():
    code = read(LOOP, CLEAN)
    good, bad = Checked("kernel", "sm_90", code, ()), Checked("kernel", "sm_90", code, ("3 fp64 instructions",))
    assert Report((good,), ("csrc/cuda: no nvcc",)).held
    assert not Report((), ("csrc/cuda: no nvcc",)).held
    assert not Report((good, bad), ()).held
    assert not Report((good,), (), ("csrc/cuda: does not compile",)).held
    assert "1 of 2 kernels break" in Report((good, bad), ()).lines[-1]
