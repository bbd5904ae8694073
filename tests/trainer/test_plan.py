"""What a plan says: the engine's share, cost by formulas worked out by hand, mends that fit, and each wrong input in one line."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_policy import causal_lm

from rollout.errors import InputError
from rollout.weights.source import TensorMeta
from trainer import plan as command
from trainer import train
from trainer.config import RunConfig
from trainer.config_file import load_config
from trainer.planner import launch
from trainer.planner.architecture import NAMED, Sizes
from trainer.planner.cost import Ceilings, Work, forward_flops, paper_hours, step_cost
from trainer.planner.fit import CONTEXT, ENGINE_ASLEEP, ENGINE_WORK, GIB, OVERHEAD, engine_share, phases, push_buffers
from trainer.planner.memory import KINDS, Peak
from trainer.planner.plan import Machine, Question, make_plan, mended
from trainer.planner.trace import PHASES, StageTrace, Traced

RECIPE = Path(__file__).parents[2] / "configs/confucius3-14b.yaml"
NO_FIT = r"^tiny\.yaml: does not fit: \w+ of stage 'one' needs [\d.]+ GB on a rank, and a GPU has 1\.2 GB; "
BIG = Sizes(
    body=13_212_057_600, head=778_567_680, parameters=14_770_033_664, layers=48, attention_width=5120, cache_elements=98_304,
    key_value_heads=8,
)  # fmt: skip
"""Qwen2.5-14B. body: 48 · (5120 · (5120 + 2 · 1024) + 5120 · 5120 + 3 · 5120 · 13824)."""


def recipe(overrides: list[str] = ()) -> RunConfig:
    """configs/confucius3-14b.yaml with an engine beside each rank, as large as it comes."""
    return load_config(RECIPE, ["engine.gpu_memory_fraction=0.85", "engine.tensor_parallel=1", *overrides])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A run of the tiny model, on engines of kind transformers: (its YAML's path)."""
    monkeypatch.chdir(tmp_path)
    causal_lm(tied=False).config.save_pretrained("model")
    Path("prompts.jsonl").write_text("")
    config = {
        "run": "run",
        "model": {"path": "model"},
        "data": {"train": {"path": "prompts.jsonl"}, "max_prompt_tokens": 16},
        "batch": {"groups": 8, "group_size": 4},
        "actor": {"tokens_per_micro_batch": 256},
        "stages": [{"name": "one", "steps": 10, "context": 64}],
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    return Path("tiny.yaml")


def metadata_of(model: dict) -> list[TensorMeta]:
    hidden, inner = model["hidden_size"], model["intermediate_size"]
    kv = hidden // model["num_attention_heads"] * model["num_key_value_heads"]
    embedding = TensorMeta("model.embed_tokens.weight", torch.float32, (model["vocab_size"], hidden))
    matrices = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    biases = {"q_bias": (hidden,), "k_bias": (kv,), "v_bias": (kv,), "norm": (hidden,), "second_norm": (hidden,)}
    shapes = matrices | biases | {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    layers = [
        TensorMeta(f"model.layers.{layer}.{name}", torch.float32, shape)
        for layer in range(model["num_hidden_layers"])
        for name, shape in shapes.items()
    ]
    last = [TensorMeta("model.norm.weight", torch.float32, (hidden,)), replace(embedding, name="lm_head.weight")]
    return [embedding, *layers, *last]


def question(**changes) -> Question:
    config = recipe()
    question = Question(config, Machine(8, 80 * 10**9), Path(), NAMED["qwen2.5-14b"], (2,))
    return question.changed("", **changes) if changes else question


def traced(gigabytes: dict[str, float] | float, stages: tuple[int, ...] = (2,)) -> Traced:
    """As if so much had been traced: by phase, or in each."""
    held = gigabytes if isinstance(gigabytes, dict) else dict.fromkeys(PHASES, gigabytes)
    peaks = {
        phase: Peak(int(held[phase] * 1e9), dict.fromkeys(KINDS, 0) | {"weights": int(held[phase] * 1e9)}) for phase in PHASES
    }
    return Traced({index: StageTrace(recipe().stages[index], 16384, peaks) for index in stages}, METADATA)


METADATA = metadata_of(NAMED["qwen2.5-14b"])


def test_sizes_of_the_recipes_model():
    assert Sizes.of(NAMED["qwen2.5-14b"], METADATA) == BIG


def test_flops_by_hand():
    """2 · B · n + 4 · L · A · n² / 2 for a sequence; score, update, MFU's update, with checkpointing and without."""
    sizes = Sizes(body=1000, head=500, parameters=2000, layers=3, attention_width=8, cache_elements=12, key_value_heads=2)
    assert forward_flops(sizes, 10, 2) == 2 * (2 * 1000 * 10 + 4 * 3 * 8 * 10**2 / 2)
    config = recipe(["batch.groups=2", "batch.group_size=2", "data.max_prompt_tokens=10", "stages[0].context=50"])
    model = {"hidden_size": 4, "intermediate_size": 6, "num_attention_heads": 2}
    cost = step_cost(config, 0, sizes, model, 8, 0, Ceilings(flops=1e3, utilisation=0.5), Work(response_share=0.5))
    forward = 4 * (2 * 1000 * 30 + 2 * 3 * 8 * 30**2)
    head = 2 * 500 * (4 * 20)
    down = 3 * 2 * 4 * 6 * (4 * 30)
    update = 4 * forward - down + 3 * head
    assert cost.flops == pytest.approx({"score": forward + head, "update": update})
    assert cost.model_flops == 3 * (forward + head)
    assert cost.tokens == 4 * 30
    assert cost.seconds["update"] == pytest.approx(update / (8 * 1e3 * 0.5))
    plain = config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": False})})
    assert step_cost(plain, 0, sizes, model, 8, 0, Ceilings(), Work(response_share=0.5)).flops["update"] == 3 * (forward + head)
    kept = recipe(
        ["batch.groups=2", "batch.group_size=2", "data.max_prompt_tokens=10", "stages[0].context=50", "model.saved_gib=9"]
    )
    attention = 4 * 2 * 3 * 8 * 30**2 + 4 * 2 * 1000 * 30 - down
    spared = step_cost(kept, 0, sizes, model, 8, 0, Ceilings(), Work(response_share=0.5)).flops["update"]
    assert spared == pytest.approx(update - attention), "everything that is dear is kept"


def test_rollout_by_hand():
    """Each of 4 engines of 2 GPUs: 16 · 2 outputs on 8 GPUs twice over are 16 for each, 5 at once, 20 tokens long."""
    sizes = Sizes(body=0, head=0, parameters=10**9, layers=1, attention_width=1, cache_elements=1000, key_value_heads=2)
    overrides = [
        "batch.groups=16",
        "batch.group_size=2",
        "data.max_prompt_tokens=10",
        "stages[1].context=50",
        "engine.tensor_parallel=2",
    ]
    ceilings = Ceilings(flops=1e30, bandwidth=1e12)
    cost = step_cost(
        recipe(overrides), 1, sizes, NAMED["qwen2.5-14b"], 8, cache_tokens=170, ceilings=ceilings, work=Work(0.5, 2.0)
    )
    assert cost.sequences_at_once == 170 // 30 == 5
    step = (2 * 10**9 + 5 * 1000 * 2 * 20) / (2 * 1e12 * 0.6)
    assert cost.seconds["rollout"] == pytest.approx(20 * 16 / 5 * step)
    assert cost.sampled_tokens == 64 * 20


def test_only_the_recipes_run_stands_beside_the_papers():
    config = recipe()
    assert paper_hours(config.stages) == (4234, 5470, 3405)
    assert paper_hours(config.stages[:2]) is None


def test_the_engines_share():
    config = recipe(["engine.gpu_memory_fraction=0.6", "engine.tensor_parallel=4"])
    engine = engine_share(config, BIG, 80 * 10**9, 2)
    assert engine.awake == 48 * 10**9 + CONTEXT
    assert engine.asleep == ENGINE_ASLEEP
    left = 48 * 10**9 - BIG.parameters * 2 // 4 - ENGINE_WORK
    assert engine.cache_tokens == int(left / (98_304 * 2 / 4))
    fixed = engine_share(recipe(["engine.kv_cache_gib=10"]), BIG, 80 * 10**9, 2)
    assert fixed.awake == BIG.parameters * 2 + ENGINE_WORK + 10 * GIB + CONTEXT
    assert fixed.cache_tokens == 10 * GIB // (98_304 * 2)
    embedded = engine_share(recipe(["engine.kind=transformers"]), BIG, 80 * 10**9, 2)
    assert embedded.asleep == BIG.parameters * 2  # it does not sleep
    assert embedded.awake - embedded.asleep == 65536 * 98_304 * 2
    server = recipe(["engine.kind=vllm-server", "engine.servers=[http://localhost:1]"])
    assert engine_share(server, BIG, 80 * 10**9, 2).awake == 0


def test_push_buffers_are_two_of_the_largest_tensor():
    assert push_buffers(recipe(), METADATA, torch.bfloat16) == 2 * 152064 * 5120 * 2
    assert push_buffers(recipe(["engine.kind=transformers"]), METADATA, torch.bfloat16) == 0


def test_a_phase_is_the_sum_of_its_parts():
    engine = engine_share(recipe(), BIG, 80 * 10**9, 2)
    rows = {row.phase: row for row in phases(2, traced(10).stages[2], engine, 10**9, OVERHEAD)}
    own = int(10e9 * (1 + OVERHEAD)) + CONTEXT
    assert rows["load"].total == own + engine.awake
    assert rows["update"].total == own + 10**9 + engine.asleep == rows["score"].total
    for phase in ("rollout", "sync", "checkpoint"):
        assert rows[phase].total == own + 10**9 + engine.awake, phase


def test_the_smallest_share_that_fits_is_found_without_tracing_again(monkeypatch):
    monkeypatch.setattr("trainer.planner.plan.traced_of", lambda _: traced(25))
    plan = make_plan(question())
    assert re.fullmatch(r"\w+ of stage '3 .*' needs 99\.5 GB on a rank, and a GPU has 80\.0 GB", plan.fault)
    mend = mended(plan)
    assert mend.fault is None
    assert mend.question.changes == ("engine.gpu_memory_fraction=0.6",)
    assert make_plan(question(engine={"gpu_memory_fraction": 0.61})).fault is not None


def test_a_cache_too_small_for_one_sequence_is_a_fault_and_spreads_the_engine(monkeypatch):
    monkeypatch.setattr("trainer.planner.plan.traced_of", lambda _: traced(35))
    small = make_plan(question(engine={"gpu_memory_fraction": 0.42}))
    assert re.fullmatch(r"rollout: vLLM's share .* leaves a cache of \d+ tokens, and one sequence may have 16384", small.fault)
    mend = mended(small)
    assert mend.question.changes[-1] == "engine.tensor_parallel=2"
    assert mend.fault is None


def test_training_that_does_not_fit_is_spread_over_more_gpus(monkeypatch):
    """Each mend is kept for the next, and the plan that is handed out was traced with all of them."""
    asked = []

    def trace(question):
        asked.append(question.changes)
        return traced(600 / question.machine.gpus)

    monkeypatch.setattr("trainer.planner.plan.traced_of", trace)
    given = question(
        model={"gradient_checkpointing": False}, parallel={"shard_ranks": 4}, tokens=32768, engine={"gpu_memory_fraction": 0.42}
    )
    given = replace(given, changes=())
    mend = mended(make_plan(given))
    assert mend.fault is None
    expected = (
        "model.gradient_checkpointing=true", "actor.tokens_per_micro_batch=16384", "parallel.shard_ranks=null",
        "optimizer.offload=true", "16 GPUs in place of 8",
    )  # fmt: skip
    assert mend.question.changes[:5] == expected
    config = mend.question.config
    assert (config.model.gradient_checkpointing, config.parallel.shard_ranks, mend.question.machine.gpus) == (True, None, 16)
    assert {stage.actor.tokens_per_micro_batch for stage in config.stages} == {16384}
    assert asked == [expected[:count] for count in range(6)]


def test_mends_of_the_optimizer(monkeypatch):
    """None that is there already; coarser gradients for bf16 weights alone."""
    monkeypatch.setattr("trainer.planner.plan.traced_of", lambda question: traced(600 / question.machine.gpus))
    offloaded = make_plan(question(optimizer={"offload": True}))
    assert not any("optimizer" in change for change in mended(offloaded).question.changes)
    coded = make_plan(question(optimizer={"kind": "adamw8bit"}, model={"weights": "bfloat16"}))
    assert "optimizer.gradients=bfloat16" in mended(coded).question.changes
    assert "optimizer.offload=true" not in mended(coded).question.changes


def test_bytes_of_a_push_and_a_checkpoint_are_the_configurations():
    sizes = Sizes(body=0, head=0, parameters=10**9, layers=1, attention_width=1, cache_elements=1, key_value_heads=1)
    ceilings, work = Ceilings(link=1e9, disk=1e9), Work()
    fp32 = step_cost(recipe(["checkpoint.every=2"]), 0, sizes, NAMED["qwen2.5-14b"], 4, 0, ceilings, work).seconds
    assert (fp32["sync"], fp32["checkpoint"]) == (4 * 3 / 4, 12 / 2)
    overrides = ["checkpoint.every=2", "optimizer.kind=adamw8bit", "model.weights=bfloat16"]
    coded = step_cost(recipe(overrides), 0, sizes, NAMED["qwen2.5-14b"], 4, 0, ceilings, work).seconds
    assert (coded["sync"], coded["checkpoint"]) == (2 * 3 / 4, (2 + 2 + 8 / 256) / 2)


def test_a_stop_that_may_come_too_late_is_said(tiny, capsys):
    """A warning, on stderr. By hand: all phases but the rollout, and a whole checkpoint, of which a step has a tenth."""
    arguments = [str(tiny), "--gpus", "2", "--memory", "8GB", "--json"]
    assert command.main(arguments) == 0
    told = capsys.readouterr()
    assert told.err == ""
    [cost] = json.loads(told.out)["cost"]
    seconds = sum(cost["seconds"][phase] for phase in ("score", "update", "sync")) + 10 * cost["seconds"]["checkpoint"]
    assert command.main([*arguments, f"checkpoint.stop_seconds={1.01 * seconds}"]) == 0
    assert capsys.readouterr().err == ""
    assert command.main([*arguments, f"checkpoint.stop_seconds={0.99 * seconds}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"^keju: warning: tiny\.yaml: checkpoint\.stop_seconds: .* in stage 'one': .* are planned with", line)


def test_nothing_fits(monkeypatch):
    monkeypatch.setattr("trainer.planner.plan.traced_of", lambda _: traced(100))
    plan = make_plan(question())
    assert mended(plan) is None
    assert "no mend that was tried fits" in command.refusal(Path("x.yaml"), plan, None)


def test_a_run_that_fits(tiny, capsys):
    assert command.main([str(tiny), "--gpus", "2", "--memory", "8GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["fault"] is None
    assert [row["phase"] for row in found["memory"]] == list(PHASES)
    assert all(row["total"] == sum(row["parts"].values()) < 8e9 for row in found["memory"])
    assert command.main([str(tiny), "--gpus", "2", "--memory", "8GB"]) == 0
    shown = capsys.readouterr().out
    for words in ("Not yet compared with a GPU", "ESTIMATE", "checkpoint"):
        assert words in shown


def test_a_run_that_does_not_fit_and_its_mend(tiny, capsys):
    """The cache of the embedded engine does not."""
    arguments = [str(tiny), "--gpus", "2", "--memory", "1100MiB", "--no-mend"]
    with pytest.raises(InputError, match=NO_FIT):
        command.main([*arguments, "engine.tokens_per_batch=1000000"])
    assert "peak" in capsys.readouterr().out
    assert command.main([*arguments, "engine.tokens_per_batch=1000"]) == 0


PAIR, THREE = (["--gpus", gpus, "--memory", "80GB"] for gpus in "23")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8", "--memory", "80"], None),
        (["--gpus", "8", "--memory", "80GQ"], r"^command line: --memory: '80GQ' is no amount of memory; write it as 80GB"),
        (["--gpus", "8", "--memory", "0GB"], r"--memory: '0GB' is no amount"),
        (["--gpus", "0", "--memory", "80GB"], r"^command line: --gpus: '0' is not a whole number above 0$"),
        ([*PAIR, "--tflops", "nan"], r"^command line: --tflops: 'nan' is not a number above 0$"),
        ([*PAIR, "--stage", "2"], r"--stage: 2 is beyond the 1 stages of tiny\.yaml$"),
        ([*PAIR, "--architecture", "gpt-5"], r"--architecture: 'gpt-5' is not known; use one of qwen2\.5-0\.5b"),
        ([*PAIR, "model.path=gone"], r"^gone/config\.json: missing; .* --architecture with one of qwen2\.5-0\.5b"),
        ([*THREE, "engine.kind=vllm", "engine.tensor_parallel=2"], r"^engine\.tensor_parallel: 2 does not divide the 3 GPUs"),
        ([*THREE, "parallel.shard_ranks=2"], r"^parallel\.shard_ranks: 2 does not divide the 3 ranks"),
        (["--memory", "80GB"], r"arguments are required: --gpus"),
    ],
)  # fmt: skip
def test_wrong_input(tiny, arguments, message):
    with pytest.raises(InputError, match=message or "does not fit"):
        command.main([str(tiny), "--no-mend", *arguments])


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("1.5 gb", 15 * 10**8), ("7", 7)])
def test_memory_units(text, size):
    assert command.bytes_of(text) == size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "model_type: None"),
        ('{"model_type": "gpt2"}', "model_type: 'gpt2'"),
        ('{"model_type": "qwen2", "vocab_size": 0}', "vocab_size: 0 is not a whole number"),
    ],
)
def test_a_broken_config_json_is_named(tiny, content, message):
    Path("model/config.json").write_text(content)
    with pytest.raises(InputError, match=rf"^model/config\.json: .*{message}"):
        command.main([str(tiny), "--gpus", "2", "--memory", "8GB"])


def test_the_recipe_fits_eight_gpus_of_80_gb(capsys):
    """All of the 14.8 B model, every stage, and a stop has its time in each: at most 72 GB where the engine sleeps. Weights,
    states, gradients by hand."""
    arguments = [str(RECIPE), "--gpus", "8", "--memory", "80GB", "--architecture", "qwen2.5-14b", "--json"]
    assert command.main(arguments) == 0
    told = capsys.readouterr()
    assert told.err == ""
    found = json.loads(told.out)
    assert [(row["stage"], row["phase"]) for row in found["memory"]] == [(stage, phase) for stage in range(3) for phase in PHASES]
    assert max(row["total"] for row in found["memory"]) <= 80e9
    update = max((row for row in found["memory"] if row["phase"] == "update"), key=lambda row: row["total"])
    assert update["total"] < 72e9
    share = 4 * BIG.parameters / 8
    assert found["model"]["parameters"] == BIG.parameters
    assert update["parts"]["weights"] == update["parts"]["gradients"] == share
    assert update["parts"]["optimizer"] == 2 * share + 4 * (48 * 12 + 3)
    assert update["parts"]["activations"] > 47 * 16384 * 5120 * 2  # each layer's input, bf16
    assert update["parts"]["loss head"] > 4096 * 152064 * 4 + 152064 * 5120 * 4


def test_a_launch_refuses_what_cannot_fit(tiny, monkeypatch):
    options = Namespace(config=tiny, overrides=["model.precision=bfloat16"], ranks=2)
    monkeypatch.setattr(launch, "gpu_memory", lambda: None)
    launch.check_memory(options)  # a CPU
    monkeypatch.setattr(launch, "gpu_memory", lambda: 10**9)
    monkeypatch.setenv("PYTHONPATH", str(RECIPE.parents[1]))
    with pytest.raises(InputError, match=r"^tiny\.yaml: does not fit: .* a GPU has 1\.0 GB"):
        launch.check_memory(options)


def test_training_checks_its_memory_once(tiny, monkeypatch):
    """By the process that starts torchrun, or by rank 0 of a torchrun that a user started; other ranks do not."""
    asked = []
    monkeypatch.setattr(train, "check_memory", lambda options: asked.append(options.ranks))
    monkeypatch.setattr(train, "check_run", lambda config: Namespace(sources={}))
    monkeypatch.setattr(train, "train", lambda config, inputs, watch: None)
    monkeypatch.setattr(train, "conclude", lambda config: None)
    monkeypatch.setattr("trainer.launch.die_with_torchrun", lambda: None)
    train.main([str(tiny), "--check", "--ranks", "4"])
    assert asked == [4]
    monkeypatch.setenv("RANK", "0")
    train.main([str(tiny), "--checked"])
    assert asked == [4]
    train.main([str(tiny)])
    assert asked == [4, 1]
    monkeypatch.setenv("RANK", "1")
    train.main([str(tiny)])
    assert asked == [4, 1]
