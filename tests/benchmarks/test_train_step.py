"""The benchmark of a whole update: its arithmetic by hand, its marks and operations on a real actor, its gate, its bad inputs."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from benchmarks.train_step import apart, gates, phases, report
from benchmarks.train_step.__main__ import main, parse
from benchmarks.train_step.bench import Bench, Figures
from benchmarks.train_step.operations import StepFlops, layer_shapes, utilisation
from benchmarks.train_step.phases import BACKWARD, CLIP, FORWARD, HEAD, OPTIMIZER, OTHER, PHASES, split
from benchmarks.train_step.setting import random_batch, run_config, way_of, ways
from rollout.errors import InputError
from trainer.distributed import process_group
from trainer.layers import LayerOptions, kept_bytes
from trainer.planner.architecture import NAMED, Sizes, model_folder
from trainer.planner.cost import PROMPT_TOKENS, computed_again
from trainer.policy import PolicyWeights

TINY = NAMED["smollm2-135m"] | {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "vocab_size": 200,
}  # fmt: skip
BODY = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
SIZES = Sizes(
    body=BODY, head=200 * 64, parameters=0, layers=2, attention_width=64, cache_elements=0, key_value_heads=2
)  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(NAMED, "tiny", TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def benches():
    """Command-line arguments, ways → a bench on one rank."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def build(*arguments: str, compare: list[str] = ()) -> Bench:
            options = parse(["tiny", *arguments])
            options.dtype = options.dtype or "float32"
            folder, model = stack.enter_context(model_folder(Path(), "tiny"))
            configs = ways(run_config(options, folder, model), list(compare), model)
            return Bench(configs, *stack.enter_context(process_group(60)))

        yield build


def test_utilisation_by_hand():
    """1.2e12 operations in 2 s on 3 ranks of 1e12 a second: a fifth of what they could."""
    assert utilisation(1.2e12, 2.0, 3, 1e12) == pytest.approx(0.2)
    flops = StepFlops(forward=10.0, head=2.0, again=7.0)
    assert (flops.model_update, flops.model_step, flops.done_update) == (36.0, 48.0, 43.0)


def test_flops_and_planned_seconds_by_hand():
    """smollm2-135m, 2 sequences of 1024 tokens, 115 of each the prompt."""
    with model_folder(Path(), "smollm2-135m") as (folder, model):
        options = parse(["smollm2-135m", "--context", "1024", "--dtype", "float32", "--checkpointing"])
        config = run_config(options, folder, model)
    body = 30 * (576 * 576 + 2 * 576 * 192 + 576 * 576 + 3 * 576 * 1536)
    sizes = Sizes(body, 49152 * 576, 134_515_008, 30, 576, 0, 3)
    flops, planned = report.cost_of(config, sizes, LlamaConfig(**model), 1, 1e11)
    forward = 2 * (2 * body * 1024 + 2 * 30 * 576 * 1024**2)
    head = 2 * 49152 * 576 * 2 * (1024 - 115)
    assert (flops.forward, flops.head) == (forward, head)
    assert planned["score"] == pytest.approx((forward + head) / (1e11 * 0.45))
    down = 30 * 2 * 576 * 1536 * 2 * 1024
    assert planned["update"] == pytest.approx((4 * forward - down + 3 * head) / (1e11 * 0.45))


def test_the_named_model_has_the_cards_sizes():
    config = NAMED["smollm2-135m"]
    assert [config[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")] == [
        576, 30, 1536, 49152,
    ]  # fmt: skip
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["tie_word_embeddings"]) == (9, 3, True)


def test_computed_again_by_hand():
    """One layer of the tiny model, a sequence of 10 tokens: all products but the last one, and attention."""
    model = SimpleNamespace(**TINY)
    layer, down, attention = 2 * BODY / 2 * 10, 2 * 64 * 96 * 10, 2 * 64 * 100
    again = lambda **options: computed_again(SIZES, model, LayerOptions(tokens=10, **options), 4, 10, 1)  # noqa: E731
    assert again() == 0
    assert again(checkpointing=True) == 2 * (layer - down + attention)
    assert again(checkpointing=True, compile=True) == 2 * (layer + attention)
    kept_attention, kept_matmuls = kept_bytes(model, 10, 4)
    assert again(checkpointing=True, saved_bytes=2 * kept_attention) == 2 * (layer - down)
    assert again(checkpointing=True, saved_bytes=kept_attention) == 2 * (layer - down) + attention
    assert again(checkpointing=True, saved_bytes=2 * kept_attention + kept_matmuls) == layer - down


class CountMatmuls(TorchDispatchMode):
    """Floating-point operations of plain matrix products; the loss head's are inside its own operation."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            first, second = args[-2:]
            self.flops += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["all kept", "checkpointing", "selective"])
def test_operations_are_those_that_run(benches, way):
    """Matrix products of a real update's layers, counted one by one: three forwards' worth, and what is computed again."""
    bench = benches("--context", "24", compare=[way])
    name = list(bench.options)[-1]
    bench.use(name)
    [scored] = bench.actor.score([bench.batch], bench.stage)
    with CountMatmuls() as counted:
        bench.actor.update(scored, bench.stage)
    tokens, options = 48, bench.options[name].layers
    attention = Counter()
    if options.checkpointing:
        from trainer.layers import plan_kept

        kept = plan_kept(2, *kept_bytes(SimpleNamespace(**TINY), 24, 4), options.saved_bytes)
        attention["again"] = sum(2 * 64 * 24**2 * 2 for layer in kept if not layer.attention)
    sizes = Sizes.of(TINY, PolicyWeights(bench.policy).metadata())
    again = computed_again(sizes, bench.policy.causal_lm.config, options, 4, 24, 2) - attention["again"]
    assert sizes.body == BODY
    assert counted.flops == 3 * 2 * BODY * tokens + again


def test_phases_sum_to_the_whole():
    marks = [(OTHER, 10.0), (OTHER, 10.5), (FORWARD, 12.0), (HEAD, 13.0), (BACKWARD, 17.0), (FORWARD, 19.0), (OTHER, 19.25)]
    seconds = split(marks)
    assert seconds == {FORWARD: 3.5, HEAD: 1.0, BACKWARD: 4.0, CLIP: 0.0, OPTIMIZER: 0.0, OTHER: 0.75}
    assert sum(seconds.values()) == 19.25 - 10.0
    means = report.means([seconds, dict.fromkeys(PHASES, 1.0)])
    assert sum(means.values()) == pytest.approx((9.25 + 6) / 2)


def test_marks_of_a_real_actor(benches):
    """Two micro-batches: what ends in which order."""
    bench = benches("--context", "24")
    with phases.watched(bench.actor) as marks:
        [scored] = bench.actor.score([bench.batch], bench.stage)
    assert [name for name, _ in marks._marks] == [OTHER, *2 * [OTHER, FORWARD, HEAD], OTHER]
    with phases.watched(bench.actor) as marks:
        bench.actor.update(scored, bench.stage)
    ended = [name for name, _ in marks._marks]
    assert ended == [OTHER, *2 * [OTHER, FORWARD, HEAD, BACKWARD], CLIP, OPTIMIZER, OTHER]
    before = len(ended)
    bench.step(Figures())
    assert len(marks._marks) == before  # the hooks are gone


def test_head_share_by_hand():
    score = dict.fromkeys(PHASES, 0.0) | {FORWARD: 3.0, HEAD: 1.0}
    update = dict.fromkeys(PHASES, 1.0) | {HEAD: 3.0}
    assert report.head_share({"score": score, "update": update}) == pytest.approx(4 / 12)


def test_ways_share_a_policy_and_differ_in_what_they_keep(benches):
    """Each way's layers are its own whenever its turn comes, and the gradient is the same."""
    bench = benches("--context", "24", compare=["checkpointing", "selective"])
    assert len(bench.options) == 3
    norms = {}
    for name in [*bench.options, *bench.options]:
        bench.use(name)
        layers = bench.policy.causal_lm.model.layers
        assert [layer.gradient_checkpointing for layer in layers] == [name != "all kept"] * 2
        [scored] = bench.actor.score([bench.batch], bench.stage)
        bench.actor._gradient_pass(scored, bench.stage, 0.0, lambda *_: None)
        gradients = [parameter.grad.full_tensor() for parameter in bench.policy.parameters()]
        norms.setdefault(name, []).append(float(torch.nn.utils.get_total_norm(gradients)))
        bench.actor.optimizer.zero_grad()
    for values in norms.values():
        assert values == pytest.approx([norms["all kept"][0]] * 2, rel=1e-5)


def test_random_weights_and_batch(benches):
    bench = benches("--context", "600", "--sequences", "3")
    parameters = dict(bench.policy.causal_lm.named_parameters())
    assert float(parameters["model.norm.weight"].full_tensor().mean()) == 1.0
    assert float(parameters["model.layers.0.mlp.up_proj.weight"].full_tensor().std()) == pytest.approx(0.02, rel=0.05)
    batch = random_batch(bench.config, 200)
    assert [len(each) for each in batch.sequences] == [600] * 3
    assert {len(each.prompt) for each in batch.sequences} == {PROMPT_TOKENS}
    assert len({each.advantage for each in batch.sequences}) == 2
    assert batch.sequences[0].sampled_logprobs[0] == pytest.approx(-math.log(200))
    assert max(int(each.response.max()) for each in batch.sequences) < 200
    assert layer_shapes(bench.policy.causal_lm) == [(64, 64), (32, 64), (32, 64), (64, 64), (96, 64), (96, 64), (64, 96)]


GOOD = {
    "name": "a line", "device": "cpu", "architecture": "tiny", "context": 64, "dtype": "float32", "metric": "mfu",
    "at_least": 0.5,
}  # fmt: skip


def toml(tmp_path: Path, **changes: object) -> Path:
    entries = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path = tmp_path / "gates.toml"
    path.write_text("[[train_step]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items()))
    return path


@pytest.mark.parametrize(
    ("limits", "value", "held"),
    [
        ({}, 0.5, True),
        ({}, 0.499, False),
        ({"at_least": None, "at_most": 0.5}, 0.5, True),
        ({"at_least": None, "at_most": 0.5}, 0.501, False),
        ({}, math.nan, False),
        ({}, None, False),
    ],
)
def test_a_gate_holds_or_not(tmp_path, limits, value, held):
    [line] = gates.read(toml(tmp_path, **limits))
    judged = gates.judge(line, {"mfu": value, "hfu": 0.5})
    assert judged.held is held
    assert ("must be" in judged.text) is not held


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrik": "mfu"}, "unknown key 'metrik'"),
        ({"metric": "speed"}, "metric: 'speed' is none of mfu, hfu, head_share, memory_ratio"),
        ({"device": "tpu"}, "device: 'tpu' is none of"),
        ({"context": "64"}, "context: '64' is of the wrong type"),
        ({"context": None}, "context is missing"),
        ({"at_most": 1.0}, "expected one of them"),
        ({"at_least": True}, "at_least: True is of the wrong type"),
    ],
)
def test_a_wrong_line_is_refused(tmp_path, changes, message):
    path = toml(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        gates.read(path)
    assert str(error.value).startswith(f"{path}: train_step 1 (a line): ")
    assert message in str(error.value)


def test_a_gate_without_a_line_is_refused(tmp_path):
    lines = gates.read(toml(tmp_path))
    assert gates.chosen(lines, "cpu", "tiny", 64, "float32") == lines
    with pytest.raises(InputError, match=r"no line for this measurement; it has tiny --context 64 --dtype float32 on cpu"):
        gates.chosen(lines, "cpu", "tiny", 128, "float32")


def test_the_gates_that_are_there():
    lines = gates.read(ROOT / "benchmarks" / "gates.toml")
    assert {(line.metric, line.at_least, line.at_most) for line in lines if line.architecture == "qwen2.5-14b"} == {
        ("mfu", 0.45, None), ("head_share", None, 0.12),
    }  # fmt: skip
    assert all(line.architecture in NAMED for line in lines)


def test_a_real_run(tmp_path, monkeypatch, capsys):
    """All of it on a tiny model; only memory, which takes processes of its own, is given."""
    planned = {"update": {"total": 900, "kinds": {"weights": 900}}}
    monkeypatch.setattr(apart, "planned", lambda *_: planned)
    monkeypatch.setattr(apart, "resident", lambda config, _: 500 if config.model.gradient_checkpointing else 1000)
    monkeypatch.setattr("benchmarks.train_step.operations.GEMM_SECONDS", {"cpu": 0.01})
    out, lines = tmp_path / "tiny.json", toml(tmp_path, metric="hfu", at_least=0.0)
    arguments = ["tiny", "--context", "64", "--rounds", "2", "--compare", "checkpointing", "--out", str(out), "--gate"]
    assert main([*arguments, "--gates", str(lines)]) == 0
    record = json.loads(out.read_text())
    kept, checkpointed = record["ways"].values()
    for way in record["ways"].values():
        assert way["seconds"]["step"]["rounds"] == 2
        assert way["grad_norm"] > 0
        update = way["phases"]["update"]
        assert min(update[phase] for phase in (FORWARD, HEAD, BACKWARD, CLIP, OPTIMIZER)) > 0
        assert way["phases"]["score"][BACKWARD] == 0
        flops = way["flops"]
        done = 3 * (flops["forward"] + flops["head"]) + flops["computed_again"]
        assert way["hfu"] == pytest.approx(done / way["seconds"]["update"]["median"] / record["gemm"]["median"])
    assert kept["mfu"] == kept["hfu"]
    assert checkpointed["hfu"] > checkpointed["mfu"]
    assert checkpointed["relative"]["memory"] == 0.5
    assert kept["memory"]["ratio"] == 0.9
    assert record["gates"] == [{"name": "a line", "held": True, "text": record["gates"][0]["text"]}]
    assert out.with_suffix(".png").stat().st_size > 10_000
    toml(tmp_path, metric="memory_ratio", at_least=0.95)
    capsys.readouterr()
    assert main([*arguments, "--gates", str(lines)]) == 1
    assert "BROKEN a line: memory_ratio 0.900, must be ≥ 0.95" in capsys.readouterr().out


def test_memory_that_could_not_be_had_is_said(monkeypatch, capsys):
    def failing(*_: object) -> None:
        raise InputError("planned: its process failed: why")

    monkeypatch.setattr(apart, "planned", failing)
    monkeypatch.setattr("benchmarks.train_step.operations.GEMM_SECONDS", {"cpu": 0.01})
    assert main(["tiny", "--context", "16", "--rounds", "1"]) == 0
    assert "all kept: memory: planned: its process failed: why" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak")
def test_processes_of_their_own():
    """The planner's and a real one's memory of the same step: weights, moments and gradients are 16 bytes a parameter."""
    with model_folder(Path(), "tiny") as (folder, model):
        options = parse(["tiny", "--context", "256", "--dtype", "float32"])
        config = run_config(options, folder, model)
        update = apart.planned(config, 1, "cpu")["update"]
        risen = apart.resident(config, 1)
    parameters = BODY + 200 * 64 + 5 * 64
    assert sum(update["kinds"][kind] for kind in ("weights", "optimizer")) == pytest.approx(12 * parameters, rel=0.01)
    assert 0 < update["total"] < 2 * risen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch", "--context", "64"], "invalid choice: 'nonesuch'"),
        (["tiny"], "the following arguments are required: --context"),
        (["tiny", "--context", "0"], "--context: '0' is not a whole number above 0"),
        (["tiny", "--context", "8193"], "--context: 8193 is beyond the 8192 positions of tiny; lower it"),
        (["tiny", "--context", "64", "--sequences", "1"], "--sequences: 1 is less than the 2 outputs of a group; raise it"),
        (["tiny", "--context", "64", "--micro-batch", "32"], "tokens_per_micro_batch 32 is smaller than context 64"),
        (["tiny", "--context", "64", "--saved-gib", "1"], "need gradient_checkpointing: true"),
        (["tiny", "--context", "64", "--weights", "bfloat16"], "needs optimizer.kind: adamw8bit"),
        (["tiny", "--context", "64", "--gate"], "gates.toml has no line for this measurement"),
        (["tiny", "--context", "64", "--gate", "--gates", "none.toml"], "none.toml: cannot be read"),
        (["tiny", "--context", "64", "--out", "none/such.json"], "--out: none is no folder; make it first"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(InputError) as error:
        main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_of_ways():
    with model_folder(Path(), "tiny") as (folder, model):
        options = parse(["tiny", "--context", "64", "--checkpointing", "--dtype", "bfloat16"])
        found = ways(run_config(options, folder, model), ["all kept", "checkpointing", "selective", "compile"], model)
    assert list(found)[:2] == ["checkpointing", "all kept"]
    assert list(found)[3] == "all kept, compiled"
    each = 64 * (4 * (16 * 2 + 4) + (64 + 2 * 32 + 64 + 2 * 96) * 2)
    selective = list(found.values())[2].model
    assert selective.saved_gib == float(f"{2 * each / 2 / 2**30:.2g}")
    assert way_of(selective) == f"checkpointing, {selective.saved_gib:g} GiB kept"
