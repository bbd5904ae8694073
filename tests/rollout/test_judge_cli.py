"""`python -m rollout.reward --judge`: rows that are marked for a judge get its verdict, or none."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rollout.errors import InputError
from rollout.reward import cli
from tests.rollout.fake_servers import free_port
from tests.rollout.judge_endpoint import block, by_material, scripted_judge

ROWS = [
    {"id": "a", "question": "1?", "answer": "1", "output": "t</think><answer>1</answer>"},
    {"id": "b", "question": "?", "answer": "x", "output": "t</think><answer>all right</answer>", "metadata": {"judge": True}},
    {"id": "c", "question": "?", "answer": "x", "output": "t</think><answer>wrong</answer>", "metadata": {"judge": True}},
    {"id": "d", "question": "?", "answer": "x", "output": "t</think><answer>silence</answer>", "metadata": {"judge": True}},
    {"id": "e", "question": "?", "answer": "x", "output": "no blocks", "metadata": {"judge": True}},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    core = Tokenizer(
        models.BPE(vocab={each: at for at, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def score(tokenizer, tmp_path):
    def run(*options, rows=ROWS):
        file, out = tmp_path / "outputs.jsonl", tmp_path / "verdicts.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert cli.main([str(file), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1", *map(str, options)]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_marked_rows_go_to_the_judge(score, capsys):
    with scripted_judge(otherwise=lambda body: 400 if block(body) == "silence" else by_material(body)) as endpoint:
        records = score("--judge", endpoint.url, "--judge-model", "m")
        assert [record["reason"] for record in records] == ["right", "right", "wrong", "unjudged", "format"]
        assert [record["reward"] for record in records] == [1, 1, -1, None, -1]
        assert len(endpoint.requests) == 1 + 3, "the check, and each once"
    assert "unjudged" in capsys.readouterr().out


def test_without_a_judge_they_have_no_verdict(score):
    assert [record["reason"] for record in score()] == ["right", "unjudged", "unjudged", "unjudged", "format"]


def test_a_budget(score, capsys):
    with scripted_judge(otherwise=by_material) as endpoint:
        records = score("--judge", endpoint.url, "--judge-model", "m", "--judge-budget", 2)
        assert [record["reason"] for record in records].count("unjudged") == 1
    assert "the budget of 2 requests is spent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--judge-model", "m"], "--judge-model: there is no judge"),
        (["--judge", "URL"], "--judge: needs the model's name"),
        (["--judge", "URL", "--judge-model", "m", "--judge-budget", "0"], "--judge-budget: 0 is too few"),
        (["--judge", "URL", "--judge-model", "m"], "no verdict from m"),
        (["--judge", "nowhere", "--judge-model", "m"], "'nowhere' is not a base address"),
    ],
)
def test_what_is_refused(score, tmp_path, options, why, monkeypatch):
    monkeypatch.setattr("rollout.reward.judge.endpoint.FIRST_PAUSE_SECONDS", 0.01)
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(InputError) as raised:
        score(*(url if option == "URL" else option for option in options))
    assert why in str(raised.value)
    assert not (tmp_path / "verdicts.jsonl").exists()
