"""Before anything imports triton, as transformers does: without a GPU its kernels are interpreted (tests/kernels)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
