"""What the demo starts from: problems of reasoning-gym, worked solutions for the warm-up, a tokenizer and a tiny random Qwen2.

Problems and scorer are reasoning-gym's chain_sum. The worked solutions come from a careless teacher: it adds up term by term,
words each line at random (several ways to say the same, as in real text, so that the policy has an entropy for TER to hold) and
now and then miscounts and goes on from there. What it teaches well is the form; to count right is left to RL.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DIFFICULTY = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1, "allow_negation": False}
OPENERS = (
    "first",
    "next",
    "then",
    "now",
    "so",
    "again",
    "here",
    "look",
    "先",
    "再",
    "现在",
    "然后",
    "接着",
    "所以",
    "于是",
    "这里",
)
EQUALS = ("=", "is", "gives", "等于")
"""English and Chinese mixed on purpose: ways of saying the same that a policy may choose between freely."""
SLIP_RATE = 0.3
"""Share of worked lines whose result is wrong."""
SLIPS = (-10, -2, -1, 1, 2, 10)
PARTS = {"warmup": 2000, "train": 1800, "heldout": 150}
"""Problems in each file. They come out of one stream without repeats, so no held-out problem was seen in training."""

END, USER, ASSISTANT = "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% else %}{{ '" + ASSISTANT + "' + message['content'] + '" + END + "' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def write_problems(folder: Path, seed: int) -> None:
    """warmup.jsonl (with the teacher's solutions and answers, right or wrong), train.jsonl and heldout.jsonl, disjoint, in the
    format of prompts files."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = _problems(seed)
    for part, count in PARTS.items():
        rows = []
        for number in range(count):
            entry, generator = next(stream)
            row = prompt_row(f"{part}-{number:05d}", entry)
            if part == "warmup":
                row["solution"], row["answer"] = worked_solution(entry["metadata"]["expression"], generator)
            rows.append(json.dumps(row, ensure_ascii=False))
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def prompt_row(identity: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A row of a prompts file from reasoning-gym's entry, which its scorer needs whole."""
    source = entry["metadata"]["source_dataset"]
    return {"id": identity, "question": entry["question"], "answer": entry["answer"], "source": source, "metadata": entry}


def _problems(seed: int) -> Iterator[tuple[dict[str, Any], random.Random]]:
    """Entries of chain_sum, each question once, with a random generator for its wording."""
    import reasoning_gym

    generator = random.Random(seed)
    seen: set[str] = set()
    for entry in reasoning_gym.create_dataset("chain_sum", size=20 * sum(PARTS.values()), seed=seed, **DIFFICULTY):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield entry, generator


def worked_solution(expression: str, generator: random.Random, slip_rate: float = SLIP_RATE) -> tuple[str, str]:
    """'4 + 7 - 9' → ('first 4 + 7 = 11\\nso 11 - 9 gives 2', '2'): each line worded at random, and wrong with probability
    slip_rate."""
    terms = expression.split()
    value, lines = int(terms[0]), []
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        result = value + int(term) if operator == "+" else value - int(term)
        if generator.random() < slip_rate:
            result += generator.choice(SLIPS)
        lines.append(f"{generator.choice(OPENERS)} {value} {operator} {term} {generator.choice(EQUALS)} {result}")
        value = result
    return "\n".join(lines), str(value)


def write_base_model(folder: Path, corpus: Path, seed: int) -> None:
    """A tokenizer trained on `corpus` (a prompts file with solutions) and a Qwen2 of 0.8 M random parameters."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer([row["question"] + "\n" + row["solution"] for row in rows]),
        eos_token=END,
        pad_token=END,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE, in which each number of the demo becomes one token; R1's markers and the four tags are single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=640,
            special_tokens=[END, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer
