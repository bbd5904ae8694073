"""Before anything imports triton, as transformers does: without a GPU its kernels are interpreted (tests/kernels). And whatever
started the tests, signals do in them what they do at a terminal: nohup and a shell's `&` have processes ignore some."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

for number, plain in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, plain)
