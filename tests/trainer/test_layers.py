"""What checkpointed layers keep, where it waits, and that compiled ones compute the same.

That each way gives the same loss and gradients is shown in test_rank_invariance.py; here, that each does what it is for: fewer
operations again, fewer bytes held, one compilation for all lengths.
"""

from collections import Counter
from functools import partial

import pytest
import tiny_policy
import torch
from tiny_policy import LAYERS, batches, build_actor, difference, one_rank, stage, whole_gradients
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import ObjectiveConfig
from trainer.layers import KEEP_ALL, MATMULS, ActivationOffload, Kept, LayerOptions, kept_bytes, plan_kept

LAYER_COUNT, LAYER_MATMULS = 2, 7


class Counted(TorchDispatchMode):
    """Operations by what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("aten::_scaled_dot_product") and "backward" not in name:
            self.counts["attention"] += 1
        if func in MATMULS:
            self.counts["matmul"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def mesh():
    with one_rank() as one:
        yield one


def backward_counts(mesh, layers: LayerOptions) -> Counter:
    """Operations of the backward alone of one packed micro-batch, whose attention is one call a layer."""
    config = stage(ObjectiveConfig(), mini=1)
    actor = build_actor(mesh, config, layers=layers)
    [micro] = actor.pack(batches(config)[0], config.actor)
    hidden = actor.policy(micro, lambda hidden, _: hidden.clone())
    with Counted() as counted:
        hidden.sum().backward()
    calls = len(micro.layout.buckets)
    assert counted.counts["attention"] % calls == 0
    counted.counts["attention"] //= calls
    return counted.counts


def test_what_is_computed_again(mesh):
    """A plain backward has two matmuls for each of the forward's; what comes on top was computed again."""
    plain = backward_counts(mesh, LAYERS["all"])
    assert plain["attention"] == 0
    again = {name: backward_counts(mesh, layers) for name, layers in LAYERS.items()}
    matmuls = {name: counts["matmul"] - plain["matmul"] for name, counts in again.items()}
    # Recomputation ends with the last result that is needed; down's own is not.
    assert matmuls["checkpointed"] == matmuls["offloaded"] == LAYER_COUNT * (LAYER_MATMULS - 1)
    assert matmuls["one layer's matmuls"] == LAYER_MATMULS - 1
    assert matmuls["matmuls"] == 0
    attention = {name: counts["attention"] for name, counts in again.items()}
    assert attention == {"all": 0, "checkpointed": 2, "one layer's matmuls": 0, "matmuls": 0, "offloaded": 2}


def test_kept_bytes_by_hand():
    # 4 heads of 6, 2 key-value heads, hidden 24, intermediate 36, 100 tokens, fp32.
    config = tiny_policy.causal_lm(tied=False).config
    assert kept_bytes(config, 100, 4) == (100 * 4 * (6 * 4 + 4), 100 * 4 * (24 + 12 + 12 + 24 + 36 + 36))


@pytest.mark.parametrize(
    ("budget", "attention", "matmuls"),
    [(0, 0, 0), (9, 0, 0), (10, 1, 0), (39, 3, 0), (40, 4, 0), (139, 4, 0), (140, 4, 1), (10**6, 4, 4)],
)
def test_a_budget_goes_to_attention_first(budget, attention, matmuls):
    kept = plan_kept(4, 10, 100, budget)
    assert kept == [Kept(index < attention, index < matmuls) for index in range(4)]
    assert attention * 10 + matmuls * 100 <= budget


def held(layers: LayerOptions, mesh) -> int:
    """Bytes of distinct storages that the graph of a forward keeps, weights apart."""
    config = stage(ObjectiveConfig(), mini=1)
    actor = build_actor(mesh, config, layers=layers)
    [micro] = actor.pack(batches(config)[0], config.actor)

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.kept = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    storage = tensor.untyped_storage()
                    self.kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return result

    with Seen() as seen:
        hidden = actor.policy(micro, lambda hidden, _: hidden.clone())
    total = sum(size for reference, size in seen.kept.values() if not reference.expired())
    del hidden
    return total


def test_a_budget_is_what_it_says(mesh):
    """Kept on top of the inputs: the formula's bytes, for the tokens of the micro-batch."""
    config = stage(ObjectiveConfig(), mini=1)
    tokens = sum(len(sequence) for sequence in batches(config)[0].sequences)
    model = tiny_policy.causal_lm(tied=False).config
    attention, matmuls = kept_bytes(model, tokens, 4)
    inputs = held(LAYERS["checkpointed"], mesh)
    assert held(LAYERS["all"], mesh) > held(LAYERS["matmuls"], mesh) > inputs
    kept = held(LAYERS["matmuls"], mesh) - inputs
    # Attention is kept by buckets, whose padding is kept too.
    assert LAYER_COUNT * (attention + matmuls) <= kept < 1.15 * LAYER_COUNT * (attention + matmuls)


class TestOffload:
    def test_what_comes_back_is_what_went(self):
        offload = ActivationOffload()
        inputs = [torch.randn(5, 3, requires_grad=True) for _ in range(3)]
        copies = [tensor.detach().clone() for tensor in inputs]
        with offload.hooks():
            total = sum((tensor * tensor).sum() for tensor in inputs)
        assert len(offload._saved) == 6  # a product saves both its factors
        with torch.no_grad():
            for tensor in inputs:
                tensor.add_(1)  # autograd would refuse this of a tensor that it kept itself
        total.backward()
        for tensor, copy in zip(inputs, copies, strict=True):
            assert torch.equal(tensor.grad, 2 * copy)
        assert offload._saved == []

    def test_a_graph_that_is_dropped_is_not_held(self):
        offload = ActivationOffload()
        tensor = torch.randn(4, requires_grad=True)
        with offload.hooks():
            total = tensor.exp().sum()
        place = offload._saved[0]
        assert place() is not None
        del total
        assert place() is None

    def test_integers_stay(self):
        offload = ActivationOffload()
        table = torch.randn(4, 2, requires_grad=True)
        index = torch.tensor([1, 3])
        with offload.hooks():
            table.index_select(0, index).sum().backward()
        assert table.grad.sum() == 4


def test_compiled_layers_compute_the_same(mesh, monkeypatch):
    """Micro-batches of different lengths, two layers: one compilation does for all of them.

    Graphs are captured and run as they are: to generate code of them takes a minute (`benchmarks.train_step --compile`).
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    config = stage(ObjectiveConfig(), mini=1, micro=4)
    results = []
    for layers in (KEEP_ALL, LayerOptions(compile=True, checkpointing=True)):
        actor = build_actor(mesh, config, layers=layers)
        [scored] = actor.score([batches(config)[0]], config)
        assert len({len(micro.input_ids_T) for micro in scored.micro}) > 1
        graphs = []

        def advance(_, graphs=graphs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        sums = actor._gradient_pass(scored, config, 0.0, advance)
        results.append((sums, whole_gradients(actor.policy)))
    assert graphs[0] > 0
    assert graphs == [graphs[0]] * 4
    [(expected, gradients), (sums, compiled)] = results
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert difference(compiled, gradients) < 1e-5
