"""Freed memory that lies between blocks in use goes back to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
from trainer.host_memory import held

def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024

blocks = [torch.ones(16000) for _ in range(4000)]   # 64 KB each: below what glibc maps by itself
kept, blocks = blocks[::20], None
before = resident()
now = held() / 2**20
assert abs(now - resident()) < 8, (now, resident())
print(before - now)
assert all(float(block.sum()) == 16000 for block in kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another way")
def test_what_lies_between_used_blocks_is_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 200, "of 240 MB that are free"
