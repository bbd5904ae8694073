"""`benchmarks.loading`: its bounds, and that what it counts is what the ranks hold."""

import json

import pytest

from benchmarks import loading as benchmark
from trainer.planner import architecture

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "vocab_size": 101,
}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "peak", "expected"),
    [(110, 260, []), (111, 260, ["read 1.11 × its share, at most 1.1"]), (110, 262, ["held 1.31 × its shards, at most 1.3"])],
)
def test_bounds(read, peak, expected):
    assert benchmark.faults({"read": read, "share": 100, "peak": peak, "shards": 200}) == expected


def test_ranks_of_a_small_model(monkeypatch, tmp_path):
    monkeypatch.setitem(architecture.NAMED, "tiny", architecture.NAMED["qwen2.5-7b"] | SIZES)
    out = tmp_path / "loading.json"
    assert benchmark.main(["tiny", "--ranks", "2", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    embedding, layer = 101 * 32, 32 * 32 + 32 + 2 * (16 * 32 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    elements = 2 * embedding + 2 * layer + 32
    assert sum(row["shards"] for row in record["ranks"]) == 4 * elements
    assert [row["read"] for row in record["ranks"]] == [row["share"] for row in record["ranks"]]
