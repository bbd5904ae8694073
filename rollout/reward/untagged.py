"""The reward for outputs without R1's tags, of a base model or another trainer: to try it on them, not to train with."""

from __future__ import annotations

import numpy as np

from rollout.reward.final_answer import final_answer
from rollout.reward.format import FormatError, Response
from rollout.reward.pipeline import Reward
from rollout.reward.tokens import Reading


class UntaggedReward(Reward):
    """No format is asked for but that there is an answer: the last answer block or \\boxed{…} behind the thinking, else the last
    line, where the thinking is over. Repetition is looked for in the whole output."""

    def _parse(self, reading: Reading) -> tuple[Response, dict[str, np.ndarray]] | FormatError:
        answer = final_answer(reading.text)
        if answer is None:
            return FormatError("no_answer", len(reading.text))
        return Response("", answer), {"output": reading.token_ids}
