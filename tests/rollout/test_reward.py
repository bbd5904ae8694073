"""The order of the reward's checks, and that the filter is a filter: what it takes out is never checked for correctness."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout.reward.pipeline import RepetitionLimits, Reward
from rollout.types import Prompt, Sample, Verdict

PREFILL = "<think>\n"
PROMPT = Prompt("p", "1+1?", "2")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": ["<turn>", "<tool>"]})
    return made


class Recorder:
    """A verifier that says right to "2" and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def verify(self, pairs):
        self.batches.append([response.answer for _, response in pairs])
        rights = [response.answer == prompt.answer for prompt, response in pairs]
        return [Verdict(right, "right" if right else "wrong") for right in rights]


def sample(tokenizer, text: str, finish_reason: str = "stop") -> Sample:
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)
    return Sample(ids, np.zeros(len(ids), np.float32), finish_reason, weight_version=1)


def count_of_7(token_ids: np.ndarray) -> str | None:
    """Stands for the detector: three tokens of the byte "7" in a part count as repeated."""
    assert token_ids.dtype == np.int32
    seven = sorted(pre_tokenizers.ByteLevel.alphabet()).index("7")
    return "777" if (token_ids == seven).sum() >= 3 else None


def judge(tokenizer, *texts: str, finish_reason: str = "stop", **options) -> tuple[list[Verdict], Recorder]:
    verifier = Recorder()
    reward = Reward(verifier, tokenizer, prefill=PREFILL, find_repetition=count_of_7, **options)
    return reward.judge([(PROMPT, sample(tokenizer, text, finish_reason)) for text in texts]), verifier


def test_each_check_in_order_and_one_batch_for_the_verifier(tokenizer):
    verdicts, verifier = judge(
        tokenizer,
        "add</think><answer> 2 </answer><end>",
        "no blocks<end>",
        "7 7 7</think><answer>2</answer><end>",
        "add</think><answer>7,7,7</answer><end>",
        "add 7</think><answer>77</answer><end>",
        "add</think><answer>2</answer><end>",
    )
    assert [verdict.reason for verdict in verdicts] == ["right", "format", "repetition", "repetition", "wrong", "right"]
    assert [verdict.reward for verdict in verdicts] == [1, -1, -1, -1, -1, 1]
    assert verifier.batches == [["2", "77", "2"]], "filtered samples were checked for correctness, or not in one batch"
    assert "think_not_closed at character 0" in verdicts[1].detail
    assert verdicts[2].detail == "thinking: 777"
    assert verdicts[3].detail == "answer: 777"


def test_truncated_comes_first_even_where_the_text_is_right(tokenizer):
    verdicts, verifier = judge(tokenizer, "7 7 7</think><answer>2</answer>", finish_reason="length")
    assert verdicts[0].reason == "truncated"
    assert verifier.batches == [], "an empty batch needs no verifier"


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("t</think><answer>2</answer><end>", {}, "right"),
        ("t</think><answer>2</answer>", {}, "right"),
        ("t</think><answer>2</answer><turn><end>", {"end_token_ids": ["<turn>"]}, "right"),
        ("t</think><answer>2</answer><turn>", {}, "format"),
        ("t</think><tool><answer>2</answer><end>", {}, "format"),
        ("t</think><answer>2<end></answer><end>", {}, "format"),
    ],
)
def test_only_end_tokens_at_the_end_are_stripped(tokenizer, text, options, reason):
    ends = [tokenizer.convert_tokens_to_ids(name) for name in options.get("end_token_ids", [])]
    verdicts, _ = judge(tokenizer, text, end_token_ids=ends)
    assert verdicts[0].reason == reason


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("t</think><answer>2<turn>6</answer><end>", 26),
        ("t<tool></think><answer>2</answer><end>", 9),
        ("鸡<end></think><answer>2</answer><end>", 9),
        ("t</think><tool><answer>2</answer><end>", 17),
        ("t</think><answer>2</answer><turn>", 35),
        ("t</think><answer>2</answer><turn><end>", 35),
    ],
)
def test_a_special_token_stands_nowhere(tokenizer, text, place):
    (verdict,), verifier = judge(tokenizer, text)
    assert (verdict.reason, verdict.detail) == ("format", f"special_token at character {place}")
    assert not verifier.batches
    assert not (PREFILL + text)[place:].startswith("鸡")
    assert (PREFILL + text)[place] == "<"


def test_tags_that_are_special_tokens_are_tags():
    """And a special token that the text alone cannot tell from a word is one: here <pad> is written as nothing else is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    verdicts, _ = judge(made, "t</think><answer>2</answer><end>", "t<pad></think><answer>2</answer><end>")
    assert [verdict.reason for verdict in verdicts] == ["right", "format"]


def test_no_samples(tokenizer):
    assert judge(tokenizer)[0] == []


def test_the_real_detector_is_the_default(tokenizer):
    pytest.importorskip("rollout.reward.repetition", reason="the repetition detector is not there")
    verifier = Recorder()
    reward = Reward(verifier, tokenizer, prefill=PREFILL, repetition=RepetitionLimits())
    loop, plain = "wait, let me check that again. " * 60, "One and one are two, as two fingers beside each other show."
    parts = [(loop, "2"), (plain, "2"), (plain, "1" + 9 * "0"), (plain, loop)]
    verdicts = reward.judge([(PROMPT, sample(tokenizer, f"{a}</think><answer>{b}</answer><end>")) for a, b in parts])
    assert [verdict.reason for verdict in verdicts] == ["repetition", "right", "wrong", "repetition"]
    assert verdicts[0].detail.startswith("thinking: ")
    assert verdicts[3].detail.startswith("answer: ")


def test_mixed_languages_are_said_of_every_verdict_and_decide_none(tokenizer):
    """Of the question's language it depends; the format, the length and the answer do not matter."""
    text, loop = "so 鸡蛋 it is", "7 7 7 鸡蛋"
    endings = ("</think><answer>2</answer>", "</think><answer>3</answer>", "")
    texts = [f"{text}{ending}" for ending in endings] + [f"{loop}{endings[0]}", f"and so it is{endings[0]}"]
    reward = Reward(Recorder(), tokenizer, prefill=PREFILL, find_repetition=count_of_7)
    for question, mixed in (("How many eggs?", True), ("有多少个鸡蛋？", False)):
        prompt = Prompt("p", question, "2")
        pairs = [(prompt, sample(tokenizer, each)) for each in texts[:4]] + [(prompt, sample(tokenizer, texts[0], "length"))]
        verdicts = reward.judge(pairs)
        assert [verdict.reason for verdict in verdicts] == ["right", "wrong", "format", "repetition", "truncated"]
        assert [verdict.mixed for verdict in verdicts] == [mixed] * 5
    assert not reward.judge([(PROMPT, sample(tokenizer, texts[4]))])[0].mixed
