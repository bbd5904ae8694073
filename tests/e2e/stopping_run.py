"""A run whose rank 1 stops, as a machine that hangs does, before the fifth tensor of the second push. For test_vllm_run.py."""

import os
import signal
import sys
import time

from rollout import deadline
from trainer import train
from trainer.policy import PolicyWeights

passes = 0
plain = PolicyWeights.__iter__


def stopping(self):
    global passes
    passes += 1
    for number, item in enumerate(plain(self)):
        if passes == 2 and number == 4:
            time.sleep(2 + deadline.POST_SECONDS)  # for the board to learn where it is, on a loaded machine too
            os.kill(os.getpid(), signal.SIGSTOP)
        yield item


if os.environ["RANK"] == "1":
    PolicyWeights.__iter__ = stopping

if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
