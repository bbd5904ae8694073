"""The byte table against the tokenizer itself: the same text, and blocks of the same tokens but for those at a block's edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from real_outputs import outputs, qwen
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout.reward.format import Response, parse_response
from rollout.reward.pipeline import Reward
from rollout.reward.tokens import ByteReader, PlainReader, byte_characters, reader_of
from rollout.types import Prompt, Sample, Verdict

PREFILL = "<think>\n"


def byte_level(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """One token a byte, and the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": ["<turn here>"]})
    return made


MERGING = byte_level([(">", "c"), ("k", ">"), ("k>", "Ċ"), ("r", ">"), ("a", "<"), ("2", "<")])


def ids_of(tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def test_every_byte_has_its_own_character():
    characters = byte_characters()
    assert sorted(characters) == list(range(256))
    assert set(characters.values()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_the_fast_reader_is_for_byte_level_tokenizers_alone():
    assert isinstance(reader_of(MERGING), ByteReader)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert isinstance(reader_of(other), PlainReader)


@given(st.lists(st.integers(0, 300), max_size=60))
@example([])
@example([0xE4, 0xE4])
def test_text_is_what_the_tokenizer_decodes(ids):
    """Cut characters, special tokens and ids beyond the vocabulary too."""
    token_ids = np.array(ids, dtype=np.int32)
    fast = ByteReader(MERGING.get_vocab()).read(token_ids).text
    assert fast == PlainReader(MERGING).read(token_ids).text


@given(st.lists(st.integers(0, 300), max_size=60))
@example([0xE4, 0xBD])
def test_a_token_ends_where_the_text_before_it_and_with_it_does(ids):
    """A cut character counts as one, whatever follows."""
    read = ByteReader(MERGING.get_vocab()).read(np.array(ids, dtype=np.int32))
    assert read.character_ends() == [len(read.raw[:end].decode("utf-8", "replace")) for end in read.ends]


def test_tokens_of_one_character_end_together():
    ids = ids_of(MERGING, "a你b\U0001f600")
    assert len(ids) == 9
    for reader in (ByteReader(MERGING.get_vocab()), PlainReader(MERGING)):
        assert reader.read(ids).character_ends() == [1, 2, 2, 2, 3, 4, 4, 4, 4]


@given(st.text(max_size=30))
def test_both_readers_agree_where_tokens_end(text):
    ids = ids_of(MERGING, text.replace("\ufffd", ""))
    assert PlainReader(MERGING).read(ids).character_ends() == ByteReader(MERGING.get_vocab()).read(ids).character_ends()


def test_both_readers_agree_where_real_tokens_end():
    tokenizer = qwen()
    ids = ids_of(tokenizer, "<think>\n设 x 为饕餮的数量，𠮷𠮷 <br> √2≈1.4\u3000😀</think> <answer>\\boxed{3}</answer><|im_end|>")
    fast, plain = reader_of(tokenizer).read(ids), PlainReader(tokenizer).read(ids)
    assert fast.character_ends() == plain.character_ends()
    assert len({*fast.character_ends()}) < len(ids), "some characters take several tokens"


def test_a_tokenizer_whose_spaces_depend_on_what_is_before():
    """SentencePiece's kind: a space stands before each word but a text's first, and what has no token falls back to bytes."""
    pieces = ["<unk>", "▁to", "▁be", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    reader = reader_of(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))
    assert isinstance(reader, PlainReader)
    reading = reader.read(np.array([1, 2, 3, *(4 + byte for byte in "你".encode()), 1, 4 + 0xE4], dtype=np.int32))
    assert reading.text == "to be 你 to\ufffd"
    assert reading.character_ends() == [2, 5, 6, 7, 7, 7, 10, 11]


def test_a_text_that_is_mended_as_a_whole_has_no_ends():
    class Mending:
        def decode(self, ids, **_):
            return "".join(sorted(map(str, ids)))

    reading = PlainReader(Mending()).read(np.array([3, 1, 2], dtype=np.int32))
    assert (reading.text, reading.character_ends()) == ("123", None)


def test_text_is_what_the_real_tokenizer_decodes():
    tokenizer = qwen()
    fast, plain = reader_of(tokenizer), PlainReader(tokenizer)
    assert isinstance(fast, ByteReader)
    rng = np.random.default_rng(0)
    for _ in range(200):
        token_ids = rng.integers(0, 152064, rng.integers(0, 200)).astype(np.int32)
        assert fast.read(token_ids).text == plain.read(token_ids).text


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>ba</think><answer>12</answer>", "b", "1"),  # a< and 2< are tokens, of no block
        ("<think>\nb \n</think>\n<answer>3</answer>", "b", "3"),  # k>⏎ is one
        ("\n<think>cab</think><answer>c3</answer>", "ab", "3"),  # and so is >c
        ("<think>b</think><answer>\u3000题 \xa0</answer>", "b", "题"),
        ("<think></think><answer>3</answer>", "", "3"),
        ("<think>\n \n</think>\n\n<answer> 3x </answer>\n", "", "3x"),
    ],
)
def test_blocks_hold_the_tokens_within(text, thinking, answer):
    for prefill in filter(text.startswith, ["", "<think>", PREFILL]):
        read = ByteReader(MERGING.get_vocab()).read(ids_of(MERGING, text.removeprefix(prefill)))
        blocks = read.blocks(prefill)
        assert {name: MERGING.decode(ids) for name, ids in blocks.items()} == {"thinking": thinking, "answer": answer}
        assert all(ids.dtype == np.int32 for ids in blocks.values())


@settings(max_examples=300)
@given(st.text(max_size=40), st.text(max_size=12), st.sampled_from(["", "\n", " \u3000", "\x85"]))
def test_blocks_agree_with_the_text(thinking, answer, gap):
    text = f"{thinking}</think>{gap}<answer>{gap}{answer}</answer>"
    token_ids = ids_of(MERGING, text)
    read = ByteReader(MERGING.get_vocab()).read(token_ids)
    response = parse_response(read.text, PREFILL)
    if isinstance(response, Response):
        blocks = read.blocks(PREFILL)
        for name, whole in (("thinking", response.thinking), ("answer", response.answer)):
            inside = b"".join(piece_bytes(token) for token in blocks[name]).decode("utf-8", "ignore")
            assert inside in whole
            assert len(whole) - len(inside) <= 2, "more than the edge is missing"


def test_ids_that_stand_for_nothing_are_in_no_block():
    """Models pad their embedding; two such ids in each round hide a loop from every measure of repetition."""
    tokenizer, rng = qwen(), np.random.default_rng(0)
    parts = [ids_of(tokenizer, "<think>\n")]
    for _ in range(400):
        parts += [ids_of(tokenizer, "wait no "), rng.integers(len(tokenizer), 152064, 2).astype(np.int32)]
    hidden = np.concatenate([*parts, ids_of(tokenizer, "</think><answer>3</answer>")])
    visible = hidden[hidden < len(tokenizer)]
    reader = reader_of(tokenizer)
    assert len(visible) == len(hidden) - 800
    blocks, plain = reader.read(hidden).blocks(""), reader.read(visible).blocks("")
    assert all(np.array_equal(blocks[name], plain[name]) for name in plain)
    pair = (Prompt("p", "How many?", "3"), Sample(hidden, np.zeros(len(hidden), np.float32), "stop", 0))
    for each in (reader, PlainReader(tokenizer)):
        (verdict,) = Reward(Right(), tokenizer, prefill="", reader=each).judge([pair])
        assert verdict.reason == "repetition"


@pytest.mark.parametrize("reader", [ByteReader(MERGING.get_vocab()), PlainReader(MERGING)])
def test_a_negative_id_is_named(reader):
    with pytest.raises(ValueError, match="token id -7 at 2"):
        reader.read(np.array([1, 2, -7, -1], dtype=np.int32))


def piece_bytes(token: int) -> bytes:
    byte_of = {character: byte for byte, character in byte_characters().items()}
    return bytes(byte_of[character] for character in MERGING.convert_ids_to_tokens(int(token)))


class Right:
    def verify(self, pairs):
        return [Verdict(True, "right", response.answer) for _, response in pairs]


def test_fast_and_plain_give_the_same_verdicts_on_real_outputs():
    """Every real output that is long, a loop or of mixed languages, in the format; and as they are, out of it."""
    tokenizer = qwen()
    fast = Reward(Right(), tokenizer, prefill=PREFILL)
    plain = Reward(Right(), tokenizer, prefill=PREFILL, reader=PlainReader(tokenizer), threads=1)
    texts = [part.text for part in outputs() if part.source != "gspo-r1distill15b"][::2]
    texts += [part.text for part in outputs() if part.source == "gspo-r1distill15b"][::15]
    pairs = []
    for at, text in enumerate(texts):
        end = text if at % 3 else text.rpartition("\n\n")[2]
        tagged = text if at % 10 == 0 else f"{text}</think>\n\n<answer>{end}</answer><|im_end|>"
        ids = ids_of(tokenizer, tagged)
        pairs.append((Prompt(str(at), "How many?", "3"), Sample(ids, np.zeros(len(ids), np.float32), "stop", 0)))
    ours, theirs = fast.judge(pairs), plain.judge(pairs)
    assert {verdict.reason for verdict in ours} == {"right", "format", "repetition"}
    assert [(each.reason, each.mixed) for each in ours] == [(each.reason, each.mixed) for each in theirs]
    assert [each.detail for each in ours if each.reason != "repetition"] == [
        each.detail for each in theirs if each.reason != "repetition"
    ]
