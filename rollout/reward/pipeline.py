"""The reward of the paper: first a filter, then correctness.

    truncated → format → repetition (thinking and answer apart) → rule

The filter is no weight: a sample that it takes out gets no correctness check at all, and R = -1. Repetition is looked for in the
thinking too: where only the answer is checked, it starts in the thinking and spreads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rollout.reward.format import FormatError, Response, parse_response
from rollout.types import Prompt, Sample, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Verifier(Protocol):
    """Correctness: one verdict for each (prompt, answer), in order. `rollout.reward.rule.RuleVerifier` is one."""

    def verify(self, pairs: list[tuple[Prompt, str]]) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True)
class RepetitionLimits:
    """When a text of n tokens, a thinking or an answer, counts as repeated: if a loop covers enough of it, or if too many of its
    n-grams come again. The paper names the check and is silent on its numbers; these are ours."""

    ngram: int = 20
    """Tokens in the n-grams whose share is measured."""
    min_covered: float = 0.2
    """A loop must cover at least this part of the text …"""
    min_count: int = 5
    """… and go round at least so often …"""
    min_tokens: int = 64
    """… and be at least so long: an answer of 1000000 is six equal digits, and no loop."""
    max_ngram_share: float = 0.4
    """The most that repeated n-grams may take of all n-grams."""


class Reward:
    """Judges samples; holds no state but its parts."""

    def __init__(
        self,
        verifier: Verifier,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefill: str,
        repetition: RepetitionLimits | None = None,
        find_repetition: Callable[[np.ndarray], str | None] | None = None,
        end_token_ids: Collection[int] = (),
    ) -> None:
        """prefill: what the prompts end with (`rollout.template.encode_prompt`), "" for nothing.

        find_repetition: int32 [n] token ids → why they are repetitive, or None; left out, it is `rollout.reward.repetition` under
        `repetition`. end_token_ids: tokens that end a response beside the tokenizer's own (generation_config may name several).
        """
        self._verifier, self._tokenizer, self._prefill = verifier, tokenizer, prefill
        self._find_repetition = find_repetition or _detector(repetition or RepetitionLimits())
        self._end_ids = frozenset(end_token_ids) | ({tokenizer.eos_token_id} - {None})

    def judge(self, prompt_samples: Sequence[tuple[Prompt, Sample]]) -> list[Verdict]:
        """One verdict for each sample, in order. Those that pass the filter go to the verifier in one batch."""
        verdicts: dict[int, Verdict] = {}
        responses: dict[int, Response] = {}
        for index, (_, sample) in enumerate(prompt_samples):
            parsed = self._parse(sample)
            if isinstance(parsed, Verdict):
                verdicts[index] = parsed
            else:
                responses[index] = parsed
        verdicts |= self._repeated(responses)
        passed = [index for index in responses if index not in verdicts]
        if passed:
            judged = self._verifier.verify([(prompt_samples[index][0], responses[index].answer) for index in passed])
            verdicts |= dict(zip(passed, judged, strict=True))
        return [verdicts[index] for index in range(len(prompt_samples))]

    def _parse(self, sample: Sample) -> Response | Verdict:
        if sample.finish_reason == "length":
            return Verdict(False, "truncated", f"no end within {len(sample.token_ids)} tokens")
        parsed = parse_response(self._decode(sample.token_ids), self._prefill)
        if isinstance(parsed, FormatError):
            return Verdict(False, "format", f"{parsed.reason} at character {parsed.place}")
        return parsed

    def _decode(self, token_ids: np.ndarray) -> str:
        """The text as it was sampled, special tokens visible, but for the end tokens at its end."""
        ids = token_ids.tolist()
        while ids and ids[-1] in self._end_ids:
            ids.pop()
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _repeated(self, responses: dict[int, Response]) -> dict[int, Verdict]:
        verdicts = {}
        for index, response in responses.items():
            for part, text in (("thinking", response.thinking), ("answer", response.answer)):
                ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                why = self._find_repetition(np.asarray(ids, dtype=np.int32))
                if why is not None:
                    verdicts[index] = Verdict(False, "repetition", f"{part}: {why}")
                    break
        return verdicts


def _detector(limits: RepetitionLimits) -> Callable[[np.ndarray], str | None]:
    from rollout.reward.repetition import is_repetitive, measure_repetition

    def find(token_ids: np.ndarray) -> str | None:
        return is_repetitive(
            measure_repetition(token_ids, limits.ngram),
            len(token_ids),
            min_covered=max(limits.min_tokens, math.ceil(limits.min_covered * len(token_ids))),
            min_count=limits.min_count,
            max_ngram_share=limits.max_ngram_share,
        )

    return find
