"""A mini-batch with a number that is not finite leaves no trace in what is learnt, and enough of one for whoever studies it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_policy import batches, build_actor, one_rank, stage, whole_weights

from rollout.ranks import Ranks
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.actor import Scoring
from trainer.batch import MiniBatch
from trainer.config import GuardsConfig, ObjectiveConfig
from trainer.guards import GRADIENT, LOSS, RECOMPUTED, SAMPLED, Guard
from trainer.quarantine import Quarantine, kept_folders, read_batch
from trainer.step_row import _trained

OBJECTIVE = ObjectiveConfig(entropy_target=2.4, entropy_coefficient=0.2)
CONFIG = stage(OBJECTIVE, warmup_steps=4)


@pytest.fixture(scope="module")
def mesh():
    with one_rank() as mesh:
        yield mesh


def scored_of(actor, batch):
    return actor.score([batch], CONFIG)[0]


def spoil_sampled(actor, batch):
    first, *rest = batch.sequences
    logprobs = first.sampled_logprobs.copy()
    logprobs[-1] = -math.inf
    return scored_of(actor, MiniBatch((replace(first, sampled_logprobs=logprobs), *rest)))


def spoil_recomputed(actor, batch):
    """The policy's weights are bad while it scores, and good again while it learns."""
    parameter = actor.policy.causal_lm.lm_head.weight
    with torch.no_grad():
        kept = parameter.to_local().clone()
        parameter.to_local()[3] = math.nan
        scored = scored_of(actor, batch)
        parameter.to_local().copy_(kept)
    for micro in scored.micro:
        micro.old_logprob_R = torch.full_like(micro.old_logprob_R, -1.0)
    return scored


def spoil_loss(actor, batch):
    scored = scored_of(actor, batch)
    scored.micro[0].old_logprob_R = torch.full_like(scored.micro[0].old_logprob_R, math.nan)
    return scored


def spoil_gradient(actor, batch):
    """Advantages so large that the loss is finite and its gradient is not."""
    scored = scored_of(actor, batch)
    scored.micro[0].advantage_R = torch.full_like(scored.micro[0].advantage_R, 3e38)
    return scored


SPOILT = [
    (spoil_sampled, SAMPLED),
    (spoil_recomputed, RECOMPUTED),
    (spoil_loss, LOSS),
    (spoil_gradient, GRADIENT),
]


def trace(actor):
    """Weights, moments and the rate's clock."""
    moments = {
        (name, key): value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
        for name, parameter in actor.policy.named_parameters()
        for key, value in actor.optimizer.state.get(parameter, {}).items()
    }
    return whole_weights(actor.policy) | moments | {"updates": torch.tensor(actor.updates)}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(("spoil", "fault"), SPOILT, ids=[fault for _, fault in SPOILT])
def test_after_a_skip_everything_is_as_if_the_mini_batch_had_not_been(mesh, spoil, fault):
    """Good, bad, good against good, good: the same bits, in the rate of a warm-up too."""
    good, other = batches(CONFIG)
    outcomes = []
    for bad in (None, spoil):
        actor = build_actor(mesh, CONFIG)
        assert actor.update(scored_of(actor, good), CONFIG).fault is None
        if bad is not None:
            before = trace(actor)
            result = actor.update(bad(actor, other), CONFIG)
            assert (result.fault, result.skipped) == (fault, True)
            if fault in (LOSS, GRADIENT):
                assert result.grad_norm == math.inf, "a maximum over ranks may lose a NaN, and with it the decision"
            assert same(trace(actor), before)
            assert len(before) > 2 * len(list(actor.policy.parameters())), "moments are there to be compared"
            assert all(parameter.grad is None for parameter in actor.policy.parameters())
        outcomes.append((actor.update(scored_of(actor, other), CONFIG), trace(actor)))
    (result, after), (result_skipped, after_skipped) = outcomes
    assert result == result_skipped
    assert same(after, after_skipped)
    assert result.lr == pytest.approx(1e-3 * 2 / 4)


def test_a_loss_that_is_not_finite_does_not_have_the_sign_of_the_entropy_tried_again(mesh):
    good, _ = batches(CONFIG)
    actor = build_actor(mesh, CONFIG)
    passes = []
    plain = actor._gradient_pass
    actor._gradient_pass = lambda *arguments: passes.append(1) or plain(*arguments)
    scored = scored_of(actor, good)
    with torch.no_grad():
        actor.policy.causal_lm.lm_head.weight.to_local()[3] = math.nan
    result = actor.update(scored, CONFIG)
    assert (len(passes), result.sign_missed, result.fault) == (1, False, LOSS)


def test_a_step_reports_the_mini_batches_that_were_trained_on(mesh):
    good, other = batches(CONFIG)
    actor = build_actor(mesh, CONFIG)
    bad = actor.update(spoil_loss(actor, good), CONFIG)
    fine = actor.update(scored_of(actor, other), CONFIG)
    row = _trained([bad, fine], CONFIG)
    assert row["guard/skipped"] == 1
    assert row["loss/policy"] == fine.policy_loss
    assert row["grad_norm"] == fine.grad_norm
    assert _trained([bad, bad], CONFIG)["guard/skipped"] == 2
    assert not math.isfinite(_trained([bad, bad], CONFIG)["grad_norm"])


# what is counted


def guard(limit=3):
    notes = []
    return Guard(GuardsConfig(max_skipped=limit), "runs/x/quarantine", notes.append), notes


def test_steps_in_a_row_stop_the_run():
    watched, notes = guard()
    for step, faults in enumerate([[LOSS, None], [None, GRADIENT], [None, None], [LOSS, LOSS], [None, LOSS]], start=1):
        watched.see(step, faults)
        assert watched.why_stop() is None, step
    assert notes[0] == "step 1: mini-batch 1 of 2 not trained on: its loss is not finite"
    assert len(notes) == 5
    watched.see(6, [SAMPLED, None])
    why = watched.why_stop()
    assert why.startswith("steps 4 to 6 each had a mini-batch that could not be trained on, the last for its sampled log-prob")
    assert "runs/x/quarantine" in why
    assert "the engine" in why


def test_the_count_survives_a_resume():
    watched, _ = guard()
    watched.recall([{"step": step, "guard/skipped": skipped} for step, skipped in enumerate([1, 0, 2, 1], start=1)])
    assert watched.why_stop() is None
    watched.see(5, [LOSS])
    assert watched.why_stop().startswith("steps 3 to 5 ")
    watched.recall([])
    watched.see(1, [LOSS])
    assert watched.why_stop() is None


# what is kept


def groups_of(batch: MiniBatch, size: int = 3) -> list[Group]:
    """As groups the sequences of tiny_policy's batches."""
    groups = []
    for first in range(0, len(batch.sequences), size):
        members = batch.sequences[first : first + size]
        samples = tuple(Sample(each.response, each.sampled_logprobs, "stop", 4) for each in members)
        verdicts = tuple(Verdict(k == 0, "right" if k == 0 else "wrong", "why") for k in range(size))
        groups.append(Group(Prompt(f"../{first}", "?", "!"), members[0].prompt, samples, verdicts, drawn_step=4))
    return groups


def quarantine(run, keep=20, ranks=None, notes=None):
    return Quarantine(run, keep, ranks or Ranks(), 1, (notes if notes is not None else []).append)


@pytest.mark.parametrize("in_parts", [False, True], ids=["at once", "scored on the way"])
def test_a_skipped_mini_batch_is_kept_as_it_was(mesh, tmp_path, in_parts):
    config = CONFIG.model_copy(update={"actor": CONFIG.actor.model_copy(update={"micro_batches": 3})})
    actor = build_actor(mesh, config)
    good, other = batches(config)
    spoilt = spoil_sampled(actor, other).whole
    if in_parts:
        scoring = Scoring(actor, config)
        for part in (spoilt.sequences[4:], spoilt.sequences[:4]):
            scoring.add(MiniBatch(part))
        bad = scoring.finish(spoilt)
    else:
        bad = actor.score([spoilt], config)[0]
    scored = [actor.score([good], config)[0], bad]
    updates = [actor.update(each, config) for each in scored]
    groups = groups_of(good) + groups_of(spoilt)
    quarantine(tmp_path).keep(6, groups, scored, updates)
    (folder,) = kept_folders(tmp_path / "quarantine")
    assert folder.name == "step-000006-mini-1"
    kept = read_batch(folder)
    assert (kept.facts["reason"], kept.facts["weight_version"], kept.facts["mini_batch"]) == (SAMPLED, 5, 1)
    assert kept.facts["grad_norm"] == updates[1].grad_norm
    assert [group.prompt.id for group in kept.groups] == ["../0", "../3"]
    assert kept.groups[0].verdicts == groups_of(spoilt)[0].verdicts
    assert kept.groups[0].samples[0].logprobs[-1] == -math.inf
    expected = {}
    for micro, part in zip(bad.micro, bad.parts, strict=True):
        sizes = [len(part.sequences[index].response) for index in micro.indices]
        for index, logprobs in zip(micro.indices, micro.old_logprob_R.split(sizes), strict=True):
            expected[part.sequences[index].response.tobytes()] = (logprobs.numpy(), part.sequences[index].advantage)
    assert len(expected) == 6
    for group, advantages, recomputed in zip(kept.groups, kept.advantages, kept.recomputed, strict=True):
        for sample, advantage, logprobs in zip(group.samples, advantages, recomputed, strict=True):
            np.testing.assert_array_equal(logprobs, expected[sample.token_ids.tobytes()][0])
            assert advantage == expected[sample.token_ids.tobytes()][1]


def skipped_steps(mesh, place, steps):
    actor = build_actor(mesh, CONFIG)
    good, _ = batches(CONFIG)
    bad = spoil_loss(actor, good)
    result = actor.update(bad, CONFIG)
    for step in steps:
        place.keep(step, groups_of(good), [bad], [result])


def test_the_newest_are_kept(mesh, tmp_path):
    (tmp_path / "quarantine" / "step-000001-mini-0.tmp").mkdir(parents=True)
    skipped_steps(mesh, quarantine(tmp_path, keep=2), [1, 9, 10, 1000000])
    assert [folder.name for folder in kept_folders(tmp_path / "quarantine")] == ["step-000010-mini-0", "step-1000000-mini-0"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_batch_that_cannot_be_kept_is_told_and_ends_nothing(mesh, tmp_path):
    (tmp_path / "quarantine").write_text("a file where the folder should be")
    notes = []
    skipped_steps(mesh, quarantine(tmp_path, notes=notes), [7])
    assert notes == [f"step 7: the skipped mini-batch could not be kept in {tmp_path}/quarantine (Not a directory)"]


def test_a_full_disk_leaves_no_half_batch(mesh, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from trainer import quarantine as module

    def full(arrays, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    notes = []
    skipped_steps(mesh, quarantine(tmp_path, notes=notes), [7])
    assert "No space left on device" in notes[0]
    assert list((tmp_path / "quarantine").iterdir()) == []


def test_no_rank_but_the_first_writes(mesh, tmp_path):
    class Second(SimpleNamespace):
        first = False

        def gather(self, value):
            self.gathered = value

    ranks = Second()
    skipped_steps(mesh, quarantine(tmp_path, ranks=ranks), [7])
    assert len(ranks.gathered) == 6
    assert not (tmp_path / "quarantine").exists()
