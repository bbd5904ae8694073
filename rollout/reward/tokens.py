"""A sampled output as text, where in it each token stands, and its thinking and answer as tokens.

Plainly: decode the tokens, and tokenise the two blocks' texts again. That costs some 60 ms for 16K tokens, nearly all of it the
second tokenisation, and measures tokens that were not sampled. A byte-level tokenizer (GPT-2's kind: Qwen, Llama 3, SmolLM)
allows better: the text is the concatenation of what each token stands for in bytes, so a table turns ids into text, and the
lengths say which tokens lie within a block. A tag's own tokens may merge with what is beside it (`>\\n\\n` is one token of
Qwen's): a token that is not wholly between the tags is no block's.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rollout.reward.format import Response, parse_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_BYTES = 4
"""Of a character in UTF-8."""
_TAGS = {"thinking": (b"<think>", b"</think>"), "answer": (b"<answer>", b"</answer>")}


class Reading(Protocol):
    """One output, read."""

    @property
    def text(self) -> str:
        """Special tokens are visible; bytes that are no UTF-8 are U+FFFD."""
        ...

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [n], as they were sampled."""
        ...

    def blocks(self, prefill: str) -> dict[str, np.ndarray]:
        """ "thinking" and "answer" → token ids, int32. `parse_response` has found that prefill and `text` are in the format."""
        ...

    def character_ends(self) -> list[int] | None:
        """[n]: where in `text` the characters of each token end. A token that is a part of a character ends behind it. None where
        the text is not what the tokens give one after the other: some tokenizers mend it as a whole."""
        ...


class Reader(Protocol):
    """Thread-safe."""

    def read(self, token_ids: np.ndarray) -> Reading:
        """token_ids: int32 [n]. Raises ValueError for a negative one."""
        ...


def reader_of(tokenizer: PreTrainedTokenizerBase) -> Reader:
    """The fast one where the tokenizer allows it."""
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.decoder, ByteLevel):
        return ByteReader(tokenizer.get_vocab())
    return PlainReader(tokenizer)


class PlainReader:
    """For any tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def read(self, token_ids: np.ndarray) -> Reading:
        _check(token_ids)
        tokenizer = self._tokenizer
        return _PlainReading(_decoded(tokenizer, token_ids.tolist()), token_ids, tokenizer)


@dataclass(frozen=True, slots=True)
class _PlainReading:
    text: str
    token_ids: np.ndarray
    tokenizer: PreTrainedTokenizerBase

    def blocks(self, prefill: str) -> dict[str, np.ndarray]:
        response = parse_response(self.text, prefill)
        assert isinstance(response, Response)
        return {"thinking": self._encode(response.thinking), "answer": self._encode(response.answer)}

    def character_ends(self) -> list[int] | None:
        """What a token adds to those before it, the last few of which are decoded with it: a space may depend on them."""
        ids, ends, end = self.token_ids.tolist(), [], 0
        first = settled = 0  # ids[first:settled] are those few
        for stop in range(1, len(ids) + 1):
            now = _decoded(self.tokenizer, ids[first:stop])
            if now.endswith("\ufffd") and stop < len(ids) and stop - settled < _MOST_BYTES:
                continue  # the rest of the character may follow
            added = now[len(_decoded(self.tokenizer, ids[first:settled])) :]
            if not self.text.startswith(added, end):
                return None
            end += len(added)
            ends += [end] * (stop - settled)
            first, settled = settled, stop
        return ends if end == len(self.text) else None

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)


class ByteReader:
    """For byte-level tokenizers. An id beyond the vocabulary (models pad theirs) stands for nothing, as the tokenizer has it."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        byte_of = {character: byte for byte, character in byte_characters().items()}
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 2)  # the last one for ids beyond
        for token, index in vocabulary.items():
            try:
                pieces[index] = bytes([byte_of[character] for character in token])
            except KeyError:  # an added token, which is written as it is
                pieces[index] = token.encode()
        self._bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self._lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths

    def read(self, token_ids: np.ndarray) -> Reading:
        _check(token_ids)
        ids = np.minimum(token_ids, len(self._lengths) - 1)
        lengths = self._lengths[ids]
        ends = np.cumsum(lengths)
        at = np.arange(lengths.sum()) + np.repeat(self._starts[ids] - (ends - lengths), lengths)
        raw = self._bytes[at].tobytes()
        return _ByteReading(raw.decode("utf-8", "replace"), token_ids, raw, ends - lengths, ends)


@dataclass(frozen=True, slots=True)
class _ByteReading:
    text: str
    token_ids: np.ndarray
    raw: bytes
    begins: np.ndarray
    ends: np.ndarray
    """int64 [n] each: where a token's bytes begin and end in `raw`."""

    def blocks(self, prefill: str) -> dict[str, np.ndarray]:
        # Each tag is there once, and as tags are ASCII they stand in the bytes where they stand in the text.
        judged, offset = prefill.encode() + self.raw, len(prefill.encode())
        return {
            name: self._within(judged, judged.index(start) + len(start), judged.index(stop), offset)
            for name, (start, stop) in _TAGS.items()
        }

    def character_ends(self) -> list[int]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        characters, ends = 0, []
        for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True):
            characters += len(decoder.decode(self.raw[begin:end]))
            unfinished, _ = decoder.getstate()
            ends.append(characters + bool(unfinished))
        return ends

    def _within(self, judged: bytes, start: int, stop: int, offset: int) -> np.ndarray:
        """The tokens wholly within judged[start:stop], without those of the white space at its ends, and without those that stand
        for nothing: a loop with such ids in it is a loop. `raw` begins at offset."""
        text = judged[start:stop].decode("utf-8", "replace")
        kept = text.lstrip()
        text_start = start + len(text[: len(text) - len(kept)].encode())
        text_stop = stop - len(kept[len(kept.rstrip()) :].encode())
        first = max(np.searchsorted(self.begins, start - offset), np.searchsorted(self.ends, text_start - offset, side="right"))
        last = min(np.searchsorted(self.ends, stop - offset, side="right"), np.searchsorted(self.begins, text_stop - offset))
        return self.token_ids[first:last][self.begins[first:last] < self.ends[first:last]]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _check(token_ids: np.ndarray) -> None:
    if len(token_ids) and (least := int(token_ids.min())) < 0:
        raise ValueError(f"token id {least} at {int(token_ids.argmin())}: no engine samples a negative one")


def byte_characters() -> dict[int, str]:
    """byte → the character that byte-level vocabularies write for it: itself where it is printable, else the next free one from
    U+0100 (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(0x100) if byte not in characters]
    return characters | {byte: chr(0x100 + index) for index, byte in enumerate(others)}
