"""What stands out in a sample's text, as places that a browser counts in: a loop, words in a foreign script, the tokens' ends.

A loop is looked for in characters, not in tokens, which a text alone does not have: what repeats to the token repeats to the
character too. It is shown, and judges nothing; the reward's own finding is the verdict.
"""

from __future__ import annotations

import numpy as np

from kernels.backend import has_native
from rollout.reward.languages import foreign_spans
from rollout.reward.repetition import longest_repeated_passage, measure_repetition

LOOP_COUNT = 3
LOOP_CHARACTERS = 64
"""A stretch repeated back to back is marked from so many times and characters on."""
NGRAM = 64
NGRAM_SHARE = 0.33
"""Or else, where so much of the text's n-grams (of characters) occurred before, the longest passage that did."""
SLOW_LIMIT = 20_000
"""Characters up to which a text is looked at without the native kernel, in about a second."""


def find_loop(text: str, reason: str) -> list[int]:
    """[start, stop, period, count] in characters of the text's loop; period and count 0 for a passage that merely comes back;
    empty where there is none. Without the native kernel only outputs that were refused for repetition are looked at, for time."""
    if len(text) < LOOP_CHARACTERS or (not has_native() and (reason != "repetition" or len(text) > SLOW_LIMIT)):
        return []
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.int32)
    found = measure_repetition(codes, NGRAM, min_count=LOOP_COUNT)
    if found.covered >= LOOP_CHARACTERS:
        return [found.start, found.start + found.covered, found.period, found.count]
    if found.ngram_share > NGRAM_SHARE:
        start, stop = longest_repeated_passage(codes, NGRAM)
        return [start, stop, 0, 0]
    return []


def find_foreign(text: str, question: str) -> list[int]:
    """start, stop, start, stop, … in characters."""
    return [place for span in foreign_spans(text, question) for place in span]


def browser_places(text: str, places: list[int]) -> list[int]:
    """Offsets in characters → offsets in UTF-16 units, in which a browser counts. Example: "😀a", [1, 2] → [2, 3]."""
    if text.isascii() or max(text) <= "\uffff":
        return places
    codes = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    units = np.concatenate([[0], np.cumsum(1 + (codes > 0xFFFF))])
    return units[np.clip(places, 0, len(text))].tolist()
