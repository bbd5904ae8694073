"""R1's format, as a pure check: `<think> … </think> <answer> … </answer>`, once each, in this order, nothing else around.

White space may stand around the blocks and at their ends, at most LONGEST_BLANK characters in a row: no measure of the filter
looks at it, so a policy could pad with it. Special tokens may stand nowhere, within a block or beside; whoever reads token ids
finds them (`rollout.reward.pipeline`).

The four tags are read wherever they stand. So a tag that the thinking or the answer merely quotes breaks the format too: a model
that may write tags freely learns to hide a second answer among them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Reason = Literal[
    "no_think",
    "think_not_closed",
    "two_think_blocks",
    "no_answer",
    "answer_not_closed",
    "answer_before_think",
    "two_answer_blocks",
    "stray_tag",
    "text_outside",
    "empty_answer",
    "padding",
    "special_token",
]

LONGEST_BLANK = 16
"""Most white space in a row beside a tag, far above the line breaks and blanks of any template."""

_TAG = re.compile(r"</?(?:think|answer)>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""In their order."""


@dataclass(frozen=True, slots=True)
class Response:
    """A response in the right format: the two blocks' texts, without the white space at their ends. answer is not empty."""

    thinking: str
    answer: str


@dataclass(frozen=True, slots=True)
class FormatError:
    """Why a response is not in the format, and where: `place` is a character offset into prefill + text.

    no_think, no_answer: the block never opens (place: the text's end). think_not_closed, answer_not_closed: place is the opening
    tag. two_think_blocks, two_answer_blocks: the second opening tag. answer_before_think: the answer's opening tag. stray_tag: a
    tag where none may stand (an answer inside the thinking, a closing tag too many). text_outside: the first character outside
    the blocks. empty_answer: the answer's first character, blank or its closing tag. padding: the first character of too much
    white space beside a tag, or before or behind it all. special_token: where one stands.
    """

    reason: Reason
    place: int


def parse_response(text: str, prefill: str) -> Response | FormatError:
    """The two blocks of prefill + text, or the first thing wrong with them. prefill is what the prompt ended with ("<think>\\n"
    opens the block), "" for nothing. Pure; never raises."""
    judged = prefill + text
    tags = list(_TAG.finditer(judged))
    error = _order_error(tags, len(judged))
    if error is not None:
        return error
    open_think, close_think, open_answer, close_answer = tags
    for start, end in ((0, open_think.start()), (close_think.end(), open_answer.start()), (close_answer.end(), len(judged))):
        gap = judged[start:end]
        if gap.strip():
            return FormatError("text_outside", start + len(gap) - len(gap.lstrip()))
    answer = judged[open_answer.end() : close_answer.start()].strip()
    if not answer:
        return FormatError("empty_answer", open_answer.end())
    padding = _padding(judged, tags)
    if padding is not None:
        return padding
    return Response(judged[open_think.end() : close_think.start()].strip(), answer)


def _padding(judged: str, tags: list[re.Match[str]]) -> FormatError | None:
    """The first stretch of white space beside the tags that is too long."""
    places = [0, *(place for tag in tags for place in tag.span()), len(judged)]
    for start, stop in zip(places[::2], places[1::2], strict=True):
        inner = judged[start:stop]
        head = len(inner) - len(inner.lstrip())
        if head > LONGEST_BLANK:
            return FormatError("padding", start)
        tail = len(inner.rstrip())
        if len(inner) - tail > LONGEST_BLANK:
            return FormatError("padding", start + tail)
    return None


def _order_error(tags: list[re.Match[str]], length: int) -> FormatError | None:
    """The first deviation of the tags from TAGS."""
    names = [tag.group() for tag in tags]
    for index, expected in enumerate(TAGS):
        if index == len(names):
            return _missing(expected, tags, length)
        if names[index] != expected:
            return _unexpected(tags, names, index, length)
    return _unexpected(tags, names, len(TAGS), length) if len(names) > len(TAGS) else None


def _missing(expected: str, tags: list[re.Match[str]], length: int) -> FormatError:
    match expected:
        case "<think>":
            return FormatError("no_think", length)
        case "</think>":
            return FormatError("think_not_closed", tags[0].start())
        case "<answer>":
            return FormatError("no_answer", length)
        case _:
            return FormatError("answer_not_closed", tags[2].start())


def _unexpected(tags: list[re.Match[str]], names: list[str], index: int, length: int) -> FormatError:
    """Names the tag at `index`, all before it being in order."""
    name, place = names[index], tags[index].start()
    if "<think>" not in names:
        return FormatError("no_think", length)
    if name == "<think>":
        return FormatError("two_think_blocks", place)
    if name == "<answer>":
        if index == 0:
            return FormatError("answer_before_think", place)
        if index == 1 and "</think>" not in names:
            return FormatError("think_not_closed", tags[0].start())
        if index > 2:
            return FormatError("two_answer_blocks", place)
    return FormatError("stray_tag", place)
