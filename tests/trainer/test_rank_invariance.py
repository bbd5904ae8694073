"""One batch on 1, 2 and 4 ranks and on 2 × 2 (two copies of the model, two shards each), in 1, 2, 5 and 12 micro-batches (one
sequence at a time), with each way to keep activations, and with 2 and 4 ranks that share micro-batches: the same loss, gradients,
statistics and updated weights.

Why: a token's weight belongs to the mini-batch, and gradients are summed over ranks and micro-batches. A factor of the number of
ranks, a mean taken on one rank, a dropped micro-batch or a rank without sequences would all train, and train something else.

What it proves: invariance up to fp32 rounding, with uneven shards, tied and untied embeddings, a reference policy, TER with a
target between the means of the ranks, and ranks without sequences, down to the entropy of each token as it is gathered; and for
the first mini-batch that the invariant value is the right one, which is computed in fp64 one sequence at a time. What it does
not: anything about bf16, NCCL or speed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_policy
import torch
from tiny_policy import CASES, OBJECTIVES, Case, Naive, batches, difference, one_rank, stage, train

from trainer.packing import pack
from trainer.token_values import key_of

RANKS = (1, 2, 4)
LAYOUTS = {"1": (1, 1), "2": (2, 2), "4": (4, 4), "2x2": (4, 2)}
"""(ranks, of them to a copy of the model)."""
PAIRS = [(case, layout) for case in CASES for layout in case.layouts]
TOLERANCE = 1e-5


def launch(layout: str, folder: Path) -> dict:
    """All cases on processes of this machine."""
    ranks, shards = LAYOUTS[layout]
    output = folder / f"{layout}.pt"
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, tiny_policy.__file__, str(folder / f"rendezvous-{layout}"), str(output), layout, str(shards)]
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, cwd=root) for rank in range(ranks)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return torch.load(output)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """layout → repr(case) → what `tiny_policy.train` gives."""
    folder = tmp_path_factory.mktemp("ranks")
    several = {layout: launch(layout, folder) for layout in LAYOUTS if layout != "1"}
    # On one thread like them: where a vectorised function's tail falls, which has other roundings, depends on the number of
    # threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_rank() as mesh:
            return {"1": {repr(case): train(case, mesh) for case in CASES if "1" in case.layouts}, **several}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "layout"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_invariance(results, case, layout):
    expected, got = results["1"][repr(Case(case.kind))], results[layout][repr(case)]
    assert len(expected) == len(got) == 2
    for mini_batch in range(2):
        one, other = expected[mini_batch], got[mini_batch]
        assert other["entropies"].keys() == one["entropies"].keys()
        for key, values in one["entropies"].items():
            torch.testing.assert_close(other["entropies"][key], values, rtol=TOLERANCE, atol=1e-6)
        assert other["scores"] == pytest.approx(one["scores"], rel=TOLERANCE)
        assert other["sums"] == pytest.approx(one["sums"], rel=TOLERANCE, abs=1e-6)
        numbers = [{name: value for name, value in each["update"].items() if name != "fault"} for each in (one, other)]
        assert numbers[1] == pytest.approx(numbers[0], rel=TOLERANCE, abs=1e-6)
        assert one["update"]["fault"] is other["update"]["fault"] is None
        assert difference(other["gradients"], one["gradients"]) < TOLERANCE
        lr = one["update"]["lr"]
        for name, weight in one["weights"].items():
            # AdamW divides a gradient by its own size: an entry whose gradient is all rounding moves by any share of lr.
            assert (other["weights"][name] - weight).square().mean().sqrt() < 1e-3 * lr, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_invariant_value_is_the_right_one(results, kind, layout):
    config = stage(OBJECTIVES[kind])
    objective = config.objective
    naive = Naive(batches(config)[0], config, tied=kind == "tied")
    expected = naive.policy.loss + objective.entropy_coefficient * naive.mean_entropy
    got = results[layout][repr(Case(kind))][0]
    tokens = sum(len(entropy) for entropy in naive.entropies)
    gap_T = naive.reference_gap_T
    sums = {
        "policy_loss": naive.policy.loss.item(),
        "entropy_sum": naive.mean_entropy.item() * tokens,
        "clipped_low": naive.policy.clipped_low.item(),
        "clipped_high": naive.policy.clipped_high.item(),
        "kl_sum": naive.policy.kl_sum.item(),
        "ref_kl_sum": (gap_T.exp() - 1 - gap_T).sum().item() if objective.kl_coefficient else 0.0,
        "ratio_max": naive.policy.ratio_max.item(),
        "ratio_min": naive.policy.ratio_min.item(),
    }
    assert got["sums"] == pytest.approx(sums, rel=5e-5)
    assert min(sums["clipped_low"], sums["clipped_high"]) > 0
    assert difference(got["gradients"], naive.gradients(expected)) < 1e-4
    of_each = zip(batches(config)[0].sequences, naive.entropies, strict=True)
    for sequence, entropy in of_each:
        values = got["entropies"][key_of(sequence.prompt, sequence.response).hex()]
        torch.testing.assert_close(values, entropy.detach().float(), rtol=1e-4, atol=1e-5)
    update = got["update"]
    assert update["entropy_loss"] == pytest.approx(
        objective.entropy_coefficient * abs(naive.mean_entropy.item() - objective.entropy_target), rel=1e-4
    )
    assert update["mean_entropy"] == pytest.approx(naive.mean_entropy.item(), rel=1e-5)
    assert update["ref_kl"] == pytest.approx(sums["ref_kl_sum"] / tokens, rel=5e-5)
    assert update["clipped_low"] == pytest.approx(sums["clipped_low"] / tokens)
    norm = torch.cat([gradient.flatten() for gradient in naive.gradients(expected).values()]).norm().item()
    assert update["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert not update["sign_missed"]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_batch_can_tell(kind):
    """The example shows the usual mistakes: it has parts on both sides of the entropy target, empty places, uneven ranks."""
    config = stage(OBJECTIVES[kind])
    first = batches(config)[0]
    lengths = [len(sequence) for sequence in first.sequences]
    entropies = Naive(first, config, tied=kind == "tied").entropies
    for ranks in RANKS[1:]:
        plan = pack(lengths, ranks=ranks, budget=config.actor.tokens_per_micro_batch)
        means = [torch.cat([entropies[i] for micro in rank_bins for i in micro]).mean().item() for rank_bins in plan]
        assert min(means) < config.objective.entropy_target < max(means)
    assert [] in [micro for rank_bins in pack(lengths, ranks=4, budget=16384, at_least=2) for micro in rank_bins]
    one, two = batches(config)
    assert one.response_tokens != two.response_tokens
