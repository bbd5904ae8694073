"""Before anything imports triton, as transformers does: without a GPU its kernels are interpreted (tests/kernels). And whatever
started the tests, signals do in them what they do at a terminal: nohup and a shell's `&` have processes ignore some."""

import os
import signal
import subprocess

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, plain)


@pytest.fixture
def mounted(tmp_path):
    """(size, as tmpfs takes it) → the folder of a file system of its own, of that size."""
    folders = []

    def mount(size):
        folder = tmp_path / f"small-{len(folders)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.decode().strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
