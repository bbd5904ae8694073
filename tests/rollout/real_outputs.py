"""The real outputs and the real tokenizer that several tests read, or a skip that says so."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.reward_traces import Part, parts, qwen_tokenizer

DATA = Path(__file__).parents[2] / os.environ.get("KEJU_TEST_DATA", "../shared/data")


def data() -> Path:
    if not (DATA / "traces_skythought").is_dir():
        pytest.skip(f"no test data at {DATA} (set KEJU_TEST_DATA)")
    return DATA


@cache
def qwen() -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as folder:
        return qwen_tokenizer(data(), Path(folder))


@cache
def outputs() -> tuple[Part, ...]:
    return tuple(parts(data()))
