"""A run on several ranks of which rank 1 recomputes a NaN among the log-probabilities in the steps (from 0) named in SPOILT. For
test_guarded_run.py."""

import math
import os

from trainer import launch, train
from trainer.actor import Actor
from trainer.loop import TrainingLoop

STEPS = {int(step) for step in os.environ["SPOILT"].split(",")}
now = -1
plain_score, plain_micro = TrainingLoop.score, Actor.score_micro


def score(self, collected, batches, stage, step, *arguments):
    global now
    now = step
    return plain_score(self, collected, batches, stage, step, *arguments)


def score_micro(self, micro, stage):
    plain_micro(self, micro, stage)
    if now in STEPS and len(micro.old_logprob_R):
        micro.old_logprob_R[0] = math.nan


if os.environ["RANK"] == "1":
    TrainingLoop.score, Actor.score_micro = score, score_micro

if __name__ == "__main__":
    launch.run(train.main)
