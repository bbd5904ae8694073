"""The supervised warm-up: what it teaches, that it learns, and that transformers reads what it writes."""

import json
import re

import numpy as np
import pytest

from rollout.errors import InputError
from rollout.types import Prompt
from trainer.config_file import load_config
from trainer.warmup import batches_of, check, response_text, warm_up

GSM8K = Prompt(
    id="gsm8k-1",
    question="How many altogether?",
    answer="72",
    solution="In May she sold 48/2 = <<48/2=24>>24 clips.\nIn all she sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
)
STRIP = (r"<<[^>]*>>", r"^####.*$")
CONFIG = """\
run: {folder}/run
model: {{path: {folder}/warm}}
template: {{system: ""}}
data: {{train: {{path: {folder}/data.jsonl}}, max_prompt_tokens: 24}}
actor: {{tokens_per_micro_batch: 128}}
warmup: {{base: {folder}/base, data: {{path: {folder}/data.jsonl}}, steps: 20, sequences: 8, lr: 3.0e-3, max_tokens: 48}}
stages: [{{name: one, steps: 1, context: 48}}]
"""


@pytest.mark.parametrize(
    ("prefill", "start"),
    [("<think>\n", "In May"), ("<think>", "\nIn May"), ("", "<think>\nIn May"), ("other", "<think>\nIn May")],
)
def test_gsm8k_solution_becomes_the_r1_form(prefill, start):
    text = response_text(GSM8K, [re.compile(pattern, re.MULTILINE) for pattern in STRIP], prefill)
    assert text.startswith(start)
    body = "In May she sold 48/2 = 24 clips.\nIn all she sold 48+24 = 72 clips."
    assert text.endswith(f"{body}\n</think>\n<answer>72</answer>")
    assert text.count("<think>") == (start.startswith("<think>"))


def test_without_patterns_the_solution_stays():
    assert response_text(GSM8K, [], "<think>\n") == f"{GSM8K.solution}\n</think>\n<answer>72</answer>"


def test_the_form_is_what_the_reward_asks_for():
    from rollout.reward.format import Response, parse_response

    parsed = parse_response(
        response_text(GSM8K, [re.compile(pattern, re.MULTILINE) for pattern in STRIP], "<think>\n"), "<think>\n"
    )
    assert isinstance(parsed, Response)
    assert parsed.answer.strip() == "72"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from trainer.demo_task import write_base_model

    folder = tmp_path_factory.mktemp("warmup")
    rows = [{"id": f"q{n}", "question": f"what is {n} + 1?", "answer": str(n + 1), "solution": f"{n} and 1"} for n in range(30)]
    rows.append({"id": "no solution", "question": "?", "answer": "1"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    write_base_model(folder / "base", corpus, 0)
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def test_loss_falls_and_the_saved_folder_loads(folder, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.text import load_tokenizer

    config = load_config(folder / "run.yaml")
    prompts = check(config, folder / "run.yaml")
    assert len(prompts) == 30, "a prompt without a solution takes no part"
    warm_up(config, prompts)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    warm, base = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("warm", "base"))
    weights = dict(base.named_parameters())
    assert all(
        torch.isfinite(weight).all() and not torch.equal(weight, weights[name]) for name, weight in warm.named_parameters()
    )
    assert warm.config.to_dict() | {"_name_or_path": ""} == base.config.to_dict() | {"_name_or_path": ""}
    assert AutoTokenizer.from_pretrained(folder / "warm").chat_template
    tokenizer = load_tokenizer(folder / "warm")
    assert tokenizer.get_vocab() == load_tokenizer(folder / "base").get_vocab()
    assert not (folder / "warm.tmp").exists()
    # What was learnt is in the saved weights: they give the worked solution a far better likelihood than the base does.
    text = f"{prompts[0].solution}\n</think>\n<answer>{prompts[0].answer}</answer>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        assert warm(ids, labels=ids).loss < base(ids, labels=ids).loss


def test_loss_is_the_mean_over_sequences_of_each_mean_over_its_response_tokens(folder, capsys):
    """The first loss, before any step: recomputed from the base model by plain forwards."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainer.text import end_tokens, load_tokenizer, prompt_encoder
    from trainer.warmup import example_encoder

    config = load_config(folder / "run.yaml", ["warmup.steps=1", f"model.path={folder}/one"])
    prompts = check(config, folder / "run.yaml")
    warm_up(config, prompts)
    (loss,) = re.findall(r"loss ([\d.]+)", capsys.readouterr().out)
    tokenizer = load_tokenizer(folder / "base")
    end = end_tokens(folder / "base", tokenizer)[0]
    encode = example_encoder(tokenizer, prompt_encoder(tokenizer, config.template), end, config.warmup, config)
    base, means = AutoModelForCausalLM.from_pretrained(folder / "base"), []
    for example in next(batches_of(prompts, encode, config.warmup, config.seed, print)):
        assert example.response[-1] == end
        ids = torch.tensor([[*example.prompt.tolist(), *example.response.tolist()]])
        labels = ids.clone()
        labels[0, : len(example.prompt)] = -100
        with torch.no_grad():
            means.append(base(ids, labels=labels).loss.item())
    assert float(loss) == pytest.approx(np.mean(means), abs=2e-4)


def test_batches_pass_over_the_data_and_repeat_by_seed(folder):
    config = load_config(folder / "run.yaml")
    prompts = [Prompt(str(number), "?", "1", solution="x") for number in range(20)]

    def ids(seed, count, notes=None, longest=19):
        stream = batches_of(prompts, lambda p: p if int(p.id) <= longest else None, config.warmup, seed, (notes or []).append)
        return [int(prompt.id) for _ in range(count) for prompt in next(stream)]

    assert sorted(ids(0, 5)) == sorted([*range(20)] * 2), "5 batches of 8 are two passes over 20"
    assert ids(0, 5) == ids(0, 5)
    assert ids(0, 5) != ids(1, 5)
    assert ids(0, 5)[:20] != ids(0, 5)[20:]
    assert set(ids(0, 5, longest=3)) == {0, 1, 2, 3}, "too long ones are left out"


def test_an_existing_model_folder_is_not_overwritten(folder):
    there = folder / "somebody's model"
    there.mkdir()
    (there / "model.safetensors").write_bytes(b"precious")
    config = load_config(folder / "run.yaml", [f"model.path={there}"])
    with pytest.raises(InputError, match=r"model\.path: exists"):
        check(config, folder / "run.yaml")
    assert (there / "model.safetensors").read_bytes() == b"precious"
