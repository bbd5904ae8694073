"""What the planner counts: against numbers worked out by hand, and against the same code over real tensors on real ranks.

It proves that fake tensors in a pretended group are counted like real ones on two ranks of a CPU, and that a CPU process holds
little more than what is counted; it does not prove what a GPU adds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import planner_ranks
import pytest
import torch
from planner_ranks import CASES, RANKS, Case
from tiny_policy import VOCABULARY, causal_lm
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config

from kernels import head as kernel_head
from kernels.linear_logprob_entropy import _forward as score_operation
from kernels.linear_policy_loss import _loss as policy_loss_operation
from trainer.adamw8bit import WORKSPACE
from trainer.config import OptimizerConfig
from trainer.planner import loss_head, trace
from trainer.planner.loss_head import workspace_bytes
from trainer.planner.memory import ACTIVATIONS, GATHERED, GRADIENTS, HEAD, HOST, OPTIMIZER, WEIGHTS, MemoryTracker
from trainer.policy import PolicyOptions, empty_policy

LAYERS, HIDDEN = 2, 24


def folder(path: Path, *, tied: bool) -> Path:
    causal_lm(tied=tied).config.save_pretrained(path)
    return path


def traced(path: Path, case: Case, ranks: int, device_type: str = "cpu") -> trace.StageTrace:
    return trace.trace(case.config(), folder(path, tied=case.tied), ranks, case.precision, device_type).stages[0]


def rows_on_rank_0(tied: bool, shards: int) -> int:
    """Elements of the tiny model on rank 0: of each tensor the largest of `shards` nearly equal parts of its rows."""
    return sum(-(-len(p) // shards) * (p.numel() // len(p)) for p in causal_lm(tied=tied).parameters())


@pytest.fixture(scope="module")
def on_real_ranks(tmp_path_factory):
    """The cases of planner_ranks.py, measured on two processes."""
    place = tmp_path_factory.mktemp("real")
    root = Path(__file__).parents[2]
    command = [sys.executable, planner_ranks.__file__, str(place / "meet"), str(place / "peaks.json")]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}) for rank in range(RANKS)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return json.loads((place / "peaks.json").read_text())


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(repr, CASES))
def test_fake_tensors_are_counted_like_real_ones(tmp_path, on_real_ranks, number):
    case = CASES[number]
    fake = traced(tmp_path, case, RANKS).peaks
    real = on_real_ranks[number]
    assert list(fake) == list(trace.PHASES)
    for phase, peak in fake.items():
        late = 64 * HIDDEN * 4 if phase == "sync" else 0  # a gathered tensor that gloo's thread has not let go yet
        assert 0.99 * real[phase]["total"] - late <= peak.total <= 1.01 * real[phase]["total"], phase
        for kind in (WEIGHTS, OPTIMIZER, GRADIENTS):
            assert peak.kinds[kind] == real[phase]["kinds"][kind], (phase, kind)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("ranks", "shard_ranks"), [(1, None), (4, None), (32, None), (4, 2), (32, 8)])
def test_weights_states_and_gradients_by_hand(tmp_path, tied, ranks, shard_ranks):
    """fp32 weights: 4 bytes an element; AdamW: two more of the same and a step count of 4 bytes a tensor."""
    case = Case(tied=tied, shard_ranks=shard_ranks)
    config = case.config()
    elements = rows_on_rank_0(tied, shard_ranks or ranks)
    tensors = len(list(causal_lm(tied=tied).parameters()))
    with trace.fake_ranks(ranks, shard_ranks) as mesh:
        policy = empty_policy(folder(tmp_path, tied=tied), mesh, PolicyOptions(torch.float32))
        with FakeTensorMode(allow_non_fake_inputs=True), trace.numbers_for_numpy(), MemoryTracker("cpu") as tracker:
            actor, load = trace.prepare(tracker, [policy], config, ranks)
            assert load.total == load.kinds[WEIGHTS] == 4 * elements
            assert tracker.live[OPTIMIZER] == 8 * elements + 4 * tensors
            stage = config.stages[0]
            [scored] = actor.score([trace.fullest(stage, ranks)], stage)
            assert tracker.live[GRADIENTS] == 0
            actor._gradient_pass(scored, stage, 0.0, lambda *_: None)
            assert tracker.live[GRADIENTS] == 4 * elements
            actor.optimizer.zero_grad()
            assert tracker.live[GRADIENTS] == 0


@pytest.mark.parametrize("gradients", ["float32", "bfloat16"])
def test_coded_moments_and_gradients_of_bf16_weights_by_hand(tmp_path, gradients):
    """Two codes a value, two fp32 scales for each 64 (of 128 for half of them); vectors, and what 64 does not divide, in fp32."""
    model = Qwen2Config(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    case = Case(bf16=True, weights="bfloat16", optimizer=OptimizerConfig(kind="adamw8bit", gradients=gradients))
    peaks = trace.trace(case.config(), tmp_path, 2, torch.bfloat16, "cpu").stages[0].peaks
    rows_of_64, rows_of_128 = 31 + (64 + 32 + 32 + 64 + 2 * 128) // 2, 64 // 2  # embedding, q, k, v, o, gate, up; down
    coded, vectors = 64 * rows_of_64 + 128 * rows_of_128, (64 + 32 + 32 + 3 * 64) // 2
    tables, counts = 2 * (256 + 255) * 4, 4 * (1 + 7 + 3 + 3)
    assert peaks["rollout"].kinds[WEIGHTS] == 2 * (coded + vectors)
    assert peaks["rollout"].kinds[OPTIMIZER] == 2 * coded + 8 * (rows_of_64 + rows_of_128) + 8 * vectors + tables + counts
    assert peaks["update"].kinds[GRADIENTS] in {(4 if gradients == "float32" else 2) * (coded + vectors)}


def test_offloaded_moments_are_in_no_phase(tmp_path):
    plain, offloaded = (
        traced(tmp_path, Case(optimizer=OptimizerConfig(offload=each)), 2, "cuda").peaks for each in (False, True)
    )
    for phase in trace.PHASES:
        assert offloaded[phase].kinds[OPTIMIZER] == 0
        assert HOST not in offloaded[phase].kinds
    for phase in ("rollout", "score", "sync", "checkpoint"):
        assert plain[phase].total - offloaded[phase].total == plain[phase].kinds[OPTIMIZER]


def test_what_a_step_of_the_optimizer_takes(tmp_path):
    """With nothing else in the way. Offloaded: two slots of both moments of the largest weight, 61 rows of 24 over two ranks. On
    a GPU AdamW is fused and takes nothing; coded moments take four fp32 temporaries and a random number a value of a piece."""
    largest, taken = 31 * 24, {}
    kinds = {
        "fused": Case(),
        "offloaded": Case(optimizer=OptimizerConfig(offload=True)),
        "coded": Case(bf16=True, weights="bfloat16", optimizer=OptimizerConfig(kind="adamw8bit")),
    }
    for name, case in kinds.items():
        config = case.config()
        with trace.fake_ranks(2) as mesh:
            options = PolicyOptions(case.precision, weights=getattr(torch, case.weights))
            policy = empty_policy(folder(tmp_path, tied=False), mesh, options)
            with FakeTensorMode(allow_non_fake_inputs=True), trace.numbers_for_numpy(), MemoryTracker("cuda") as tracker:
                actor, _ = trace.prepare(tracker, [policy], config, 2, "cuda")
                for parameter in policy.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                before = sum(value for kind, value in tracker.live.items() if kind != HOST)
                with tracker.phase() as peak:
                    actor.optimizer.step()
                taken[name] = peak[0].total - before
    assert taken["fused"] == 0
    assert taken["offloaded"] == 2 * 2 * 4 * largest
    assert (WORKSPACE + 4) * largest <= taken["coded"] < (WORKSPACE + 4) * largest + 100


def test_a_rank_gathers_one_unit_at_a_time(tmp_path, monkeypatch):
    """4 ranks, bf16. Scoring peaks in the head: embedding and head are whole, and there is the head's all-gather buffer, of four
    equal parts. A push makes one tensor whole, in fp32; this one has no probe."""
    monkeypatch.setattr(trace, "score_probe", lambda *_: None)
    peaks = traced(tmp_path, Case(bf16=True), 4).peaks
    whole, padded = 61 * HIDDEN, 64 * HIDDEN
    gathered = peaks["score"].kinds[GATHERED]
    assert 2 * (2 * whole + padded) <= gathered < 2 * (2 * whole + 2 * padded)
    assert peaks["rollout"].kinds[GATHERED] == 0
    assert peaks["sync"].total == peaks["rollout"].total + 4 * padded


def test_a_push_is_proved_by_a_forward(tmp_path):
    """4 ranks, bf16, untied: it gathers as much as scoring does, and leaves nothing whole behind while the engine samples."""
    peaks = traced(tmp_path, Case(bf16=True), 4).peaks
    assert peaks["sync"].kinds[GATHERED] >= peaks["score"].kinds[GATHERED]
    assert peaks["rollout"].kinds[GATHERED] == 0


def test_checkpointing_keeps_a_layers_input_and_no_more(tmp_path):
    """By hand, for one rank in fp32: a layer saves at least its input, queries, keys, values, gate, up and their product."""
    without, with_ = (traced(tmp_path, Case(checkpointing=each), 1) for each in (False, True))
    tokens = without.tokens
    saved = tokens * 4 * (HIDDEN + HIDDEN + 2 * 12 + 3 * 36)
    fewer = without.peaks["update"].total - with_.peaks["update"].total
    assert fewer >= (LAYERS - 1) * saved  # one layer's come back while it is recomputed
    assert with_.peaks["score"].total == without.peaks["score"].total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("tokens", [50, 1000])
def test_workspace_of_the_loss_head_is_what_the_head_takes(monkeypatch, dtype, with_gradient, tokens):
    """The head's own code on a CPU, its operations counted one by one, in one chunk and in several."""
    vocabulary, hidden = 3000, 256
    monkeypatch.setitem(kernel_head.CHUNK_BYTES, "cpu", 300 * vocabulary * 4)
    monkeypatch.setattr("kernels.matmul.TILE_ELEMENTS", 1 << 16)
    monkeypatch.setattr(loss_head, "TILE_ELEMENTS", 1 << 16)
    with MemoryTracker() as tracker:
        hidden_TD, weight_VD = (torch.empty(rows, hidden, dtype=dtype).normal_() for rows in (tokens, vocabulary))
        labels_T, ones_T, one = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens), torch.ones(())
        inputs = sum(tracker.live.values())
        with tracker.phase() as peak:
            if with_gradient:
                results = policy_loss_operation._init_fn(
                    hidden_TD, weight_VD, labels_T, one, -ones_T, ones_T, ones_T, None, 0.2, 0.2, 0.0, 0.0, True, dtype
                )
            else:
                results = score_operation._init_fn(hidden_TD, weight_VD, labels_T, one, dtype, False)
    taken = peak[0].total - inputs - sum(result.numel() * result.itemsize for result in results)
    planned = workspace_bytes(hidden_TD, weight_VD, "cpu", with_gradient=with_gradient)
    assert planned == pytest.approx(taken, rel=0.05)


def test_workspace_on_a_gpu_by_hand():
    """The recipe's head at 16,384 tokens, bf16: 4096 rows of 152,064 fp32 logits; with gradient the fp32 sum of d_weight beside
    them. The bf16 result is counted as a result, and made when the logits are gone."""
    hidden_TD = torch.empty(16384, 5120, dtype=torch.bfloat16, device="meta")
    weight_VD = torch.empty(152064, 5120, dtype=torch.bfloat16, device="meta")
    logits = 4096 * 152064 * 4
    assert workspace_bytes(hidden_TD, weight_VD, "cuda", with_gradient=False) == logits
    assert workspace_bytes(hidden_TD, weight_VD, "cuda", with_gradient=True) == logits + 152064 * 5120 * (4 - 2)


def test_the_workspace_is_in_the_plan(tmp_path, monkeypatch):
    """Larger workspace, larger peak by as much: of score, and of update where the head is its peak."""
    before = traced(tmp_path, Case(), 2).peaks
    monkeypatch.setattr("trainer.planner.memory.workspace_bytes", lambda *_, with_gradient: 1 << (30 if with_gradient else 29))
    after = traced(tmp_path, Case(), 2).peaks
    assert after["score"].kinds[HEAD] >= 1 << 29
    assert 1 << 30 <= after["update"].total < (1 << 30) + before["update"].total
    assert after["update"].kinds[HEAD] >= 1 << 30


def test_micro_batches_are_full_and_padded(tmp_path):
    stage = Case().config().stages[0]
    batch = trace.fullest(stage, ranks=3)
    lengths = [len(sequence) for sequence in batch.sequences]
    assert lengths == [64] * 6 + [45] * 6  # the context, 0.7 of it, and no more than the batch's 12
    assert {len(sequence) for sequence in trace.fullest(stage, ranks=1).sequences} == {64, 45, 41}  # 41 of 150 are left
    assert traced(tmp_path, Case(), 2).tokens == 150
    # a batch of the run has 12 responses: on 8 ranks no micro-batch can be as full
    assert traced(tmp_path, Case(), 8).tokens < 150


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to measure a peak")
@pytest.mark.parametrize("sizes", [(256, 6, False), (512, 4, True), (384, 8, False)])
def test_a_real_process_takes_what_was_planned(sizes):
    """Resident memory of a CPU process over a step: hidden size, layers, checkpointing. It takes up to a tenth more: the math
    library's workspaces, the allocator."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("planner_process.py")), *map(str, sizes)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout
    found = json.loads(output.splitlines()[-1])
    assert 0.9 * found["risen"] <= found["planned"] <= found["risen"]


def test_counting_by_hand():
    with MemoryTracker() as tracker:
        with tracker.phase() as peak:
            kept = torch.empty(1000, dtype=torch.uint8)
            view = kept[10:20]
            torch.empty(500, dtype=torch.uint8)  # freed at once
            assert tracker.live[ACTIVATIONS] == 1000
            kept.untyped_storage().resize_(100)
            assert tracker.live[ACTIVATIONS] == 100
            with tracker.counting_as(WEIGHTS):
                weight = torch.empty(300, dtype=torch.uint8)
        assert peak[0].total == 1500
        assert tracker.live[WEIGHTS] == 300
        del kept, weight
        assert tracker.live[ACTIVATIONS] == 100  # the view holds it
        del view
        assert not any(tracker.live.values())
        with tracker.phase() as peak:
            pass
    assert peak[0].total == 0


def test_what_activations_keep_and_where(tmp_path):
    """Of a model with layers enough that their inputs decide: a budget adds the bytes it says, and inputs on the host are not
    the GPU's but for one layer's and the next one's."""
    layers, hidden, tokens = 12, 64, 512
    path = tmp_path / "model"
    Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(path)  # fmt: skip

    def update(**model) -> int:
        case = Case(checkpointing=True)
        config = case.config()
        stage = config.stages[0].model_copy(update={"context": tokens})
        stage = stage.model_copy(update={"actor": stage.actor.model_copy(update={"tokens_per_micro_batch": tokens})})
        config = config.model_copy(update={"model": config.model.model_copy(update=model), "stages": (stage,)})
        return trace.trace(config, path, 1, torch.float32, "cpu").stages[0].peaks["update"].kinds[ACTIVATIONS]

    kept = update()
    attention = tokens * 4 * (16 * 4 + 4)
    more = update(saved_gib=layers * attention / 2**30) - kept
    assert (layers - 1) * attention <= more <= layers * attention  # the last one's is there in any case when it runs again
    inputs = tokens * hidden * 4
    assert (layers - 3) * inputs <= kept - update(offload_activations=True) <= layers * inputs
