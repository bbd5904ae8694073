"""The reward of the paper: first a filter, then correctness.

    truncated → format → repetition (thinking and answer apart) → rule or judge

The filter is no weight: a sample that it takes out gets no correctness check at all, and R = -1. Repetition is looked for in the
thinking too: where only the answer is checked, it starts in the thinking and spreads.

Beside that, each verdict says whether its output mixes languages: measured, never punished (`rollout.reward.languages`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rollout.reward.format import TAGS, FormatError, Response, parse_response
from rollout.reward.languages import mixes_languages
from rollout.reward.repetition import RepetitionDetector, RepetitionLimits
from rollout.reward.tokens import Reader, Reading, reader_of
from rollout.types import Prompt, Sample, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_THREADS = 4
FEW = 4
"""Samples that are filtered sooner than threads begin."""


class Verifier(Protocol):
    """Correctness: one verdict for each (prompt, response), in order. `rollout.reward.correctness.Correctness` is one."""

    def verify(self, pairs: list[tuple[Prompt, Response]]) -> list[Verdict]: ...


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
        reader: Reader | None = None,
        threads: int | None = None,
    ) -> None:
        """prefill: what the prompts end with (`rollout.template.encode_prompt`), "" for nothing.

        find_repetition: int32 [n] token ids → why they are repetitive, or None; left out, it is `rollout.reward.repetition` under
        `repetition`. end_token_ids: tokens that end a response beside the tokenizer's own (generation_config may name several).
        reader: from token ids to text and blocks; left out, what suits the tokenizer. threads: of the filter; None: one a core,
        four at most.
        """
        self._verifier, self._prefill = verifier, prefill
        self._reader = reader or reader_of(tokenizer)
        self._find_repetition = find_repetition or RepetitionDetector(repetition or RepetitionLimits(), tokenizer.get_vocab())
        self._end_ids = frozenset(end_token_ids) | ({tokenizer.eos_token_id} - {None})
        self._special_ids = _special_ids(tokenizer, self._end_ids)
        self._threads = ThreadPoolExecutor(threads or min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="keju-filter")

    def judge(self, prompt_samples: Sequence[tuple[Prompt, Sample]]) -> list[Verdict]:
        """One verdict for each sample, in order. Those that pass the filter go to the verifier in one batch."""
        each = map if len(prompt_samples) < FEW else self._threads.map
        filtered = list(each(self._filter, prompt_samples))
        passed = [index for index, (outcome, _) in enumerate(filtered) if isinstance(outcome, Response)]
        verdicts = [outcome for outcome, _ in filtered]
        if passed:
            judged = self._verifier.verify([(prompt_samples[index][0], verdicts[index]) for index in passed])
            for index, verdict in zip(passed, judged, strict=True):
                verdicts[index] = verdict
        return [replace(verdict, mixed=mixed) for verdict, (_, mixed) in zip(verdicts, filtered, strict=True)]

    def _filter(self, prompt_sample: tuple[Prompt, Sample]) -> tuple[Response | Verdict, bool]:
        """(what the filter leaves to be verified, or its verdict; whether the output mixes languages)."""
        prompt, sample = prompt_sample
        reading = self._reader.read(self._without_end(sample.token_ids))
        mixed = mixes_languages(reading.text, prompt.question)
        if sample.finish_reason == "length":
            return Verdict(False, "truncated", f"no end within {len(sample.token_ids)} tokens"), mixed
        parsed = self._parse(reading)
        if isinstance(parsed, FormatError):
            return Verdict(False, "format", f"{parsed.reason} at character {parsed.place}"), mixed
        response, parts = parsed
        for part, token_ids in parts.items():
            why = self._find_repetition(token_ids)
            if why is not None:
                return Verdict(False, "repetition", f"{part}: {why}"), mixed
        return response, mixed

    def _parse(self, reading: Reading) -> tuple[Response, dict[str, np.ndarray]] | FormatError:
        """(the response, the token ids of each of its parts in which nothing may repeat)."""
        special = np.flatnonzero(np.isin(reading.token_ids, self._special_ids))
        if len(special):
            before = self._reader.read(reading.token_ids[: special[0]]).text
            return FormatError("special_token", len(self._prefill) + len(before))
        parsed = parse_response(reading.text, self._prefill)
        if isinstance(parsed, FormatError):
            return parsed
        return parsed, reading.blocks(self._prefill)

    def _without_end(self, token_ids: np.ndarray) -> np.ndarray:
        """As it was sampled, but for the end tokens at its end."""
        stop = len(token_ids)
        while stop and int(token_ids[stop - 1]) in self._end_ids:
            stop -= 1
        return token_ids[:stop]


def _special_ids(tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]) -> np.ndarray:
    """int64: those that no response may hold. Some tokenizers have the four tags as special tokens, which it must."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids) | set(end_ids)
    return np.array(sorted(special - set(tokenizer.convert_tokens_to_ids(list(TAGS)))), dtype=np.int64)
