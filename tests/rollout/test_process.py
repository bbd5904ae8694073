"""What a process asks the system for."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAPS = """
import ctypes, sys, threading
from rollout import process
if sys.argv[1] == "few":
    process.few_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = (ctypes.c_int, ctypes.c_void_p)
libc.fclose.argtypes = (ctypes.c_void_p,)
together = threading.Barrier(6)
def work():
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=work) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = libc.fopen(sys.argv[2].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(__import__("ctypes").CDLL(None), "malloc_info"), reason="asks glibc for its heaps")
@pytest.mark.parametrize("how", ["few", "many"])
def test_threads_share_few_heaps(tmp_path, how):
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", HEAPS, how, tmp_path / "heaps"], cwd=root, check=True, timeout=60)
    heaps = (tmp_path / "heaps").read_text().count("<heap nr=")
    assert heaps <= 2 if how == "few" else heaps > 2
