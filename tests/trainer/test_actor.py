"""What the actor does beside the loss: the optimizer step, the clip, the rate, the skip, the weights it hands out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import Naive, batches, build_actor, difference, one_rank, shift_old, stage, whole_gradients, whole_weights

from trainer.actor import Scoring, learning_rate, loss_inputs
from trainer.batch import MiniBatch
from trainer.config import ActorConfig, ObjectiveConfig


@pytest.fixture(scope="module")
def mesh():
    with one_rank() as mesh:
        yield mesh


def test_the_first_update_after_scoring_has_ratios_of_exactly_1(mesh):
    config = stage(ObjectiveConfig(), mini=1, micro=2)
    actor = build_actor(mesh, config)
    result = actor.update(actor.score(batches(config), config)[0], config)
    assert (result.ratio_min, result.ratio_max, result.clipped_low, result.clipped_high, result.old_kl) == (1, 1, 0, 0, 0)
    assert not result.sign_missed


@pytest.mark.parametrize("max_grad_norm", [1e-2, 1e6])
def test_a_step_is_adamw_on_the_clipped_gradient(mesh, max_grad_norm):
    """Against AdamW written out on the naive loss's gradient g: m and v start at 0, so the first step is g / (|g| + eps)."""
    config = stage(ObjectiveConfig(), mini=1, max_grad_norm=max_grad_norm, weight_decay=0.1)
    actor = build_actor(mesh, config)
    before = whole_weights(actor.policy)
    (scored,) = actor.score(batches(config), config)
    shift_old([scored])
    result = actor.update(scored, config)
    naive = Naive(scored.whole, config, tied=False)
    gradients = naive.gradients(naive.policy.loss)
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    factor = min(1.0, max_grad_norm / norm)
    expected = {}
    for name, gradient in gradients.items():
        clipped = gradient * factor
        expected[name] = -1e-3 * (clipped / (clipped.abs() + 1e-8) + 0.1 * before[name])
    moved = {name: weight - before[name] for name, weight in whole_weights(actor.policy).items()}
    assert difference(moved, expected) < 5e-3, "subtraction of fp32 weights leaves some 1e-4; a sign amiss is 2 / sqrt(entries)"


def test_the_stage_sets_the_optimizer(mesh):
    """Rate, betas and decay are those of the stage that updates, not of the first."""
    config = stage(ObjectiveConfig(), mini=1)
    actor = build_actor(mesh, config)
    other = stage(ObjectiveConfig(), mini=1, lr=3e-4, betas=(0.5, 0.6), weight_decay=0.2)
    actor.update(actor.score(batches(other), other)[0], other)
    (group,) = actor.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-4, (0.5, 0.6), 0.2)


def test_the_rate_rises_over_the_warm_up():
    config = ActorConfig(lr=8.0, warmup_steps=4)
    assert [learning_rate(config, updates) for updates in range(6)] == [2, 4, 6, 8, 8, 8]
    assert learning_rate(ActorConfig(lr=8.0), 0) == 8


@pytest.mark.parametrize("micro", [1, 3])
def test_supervised_update(mesh, micro):
    config = stage(ObjectiveConfig(), mini=1, micro=micro, temperature=1.0, max_grad_norm=1e6)
    actor = build_actor(mesh, config)
    (batch,) = batches(config)
    naive = Naive(batch, config, tied=False)
    loss, grad_norm = actor.update_supervised(batch, config.actor)
    gradients = naive.gradients(naive.supervised)
    assert loss == pytest.approx(naive.supervised.item(), rel=1e-5)
    assert grad_norm == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients.values())), rel=1e-4)
    assert actor.updates == 1


def test_the_weights_handed_out_are_the_master_weights(mesh):
    """After scoring, the root still holds its weights in the compute dtype; they must not be taken for the policy's."""
    config = stage(ObjectiveConfig(), mini=1)
    actor = build_actor(mesh, config, precision=torch.bfloat16)
    before = whole_weights(actor.policy)
    actor.score(batches(config), config)
    after = whole_weights(actor.policy)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in after.items())


def test_bf16_compute_is_near_fp32(mesh):
    """The loss's own inputs stay fp32, so bf16 costs the model's rounding and no more; cast, ratios would be off by 0.03."""
    results = {}
    for precision in (torch.float32, torch.bfloat16):
        config = stage(ObjectiveConfig(), mini=1)
        actor = build_actor(mesh, config, precision=precision)
        results[precision] = actor.update(actor.score(batches(config), config)[0], config)
    exact, rounded = results.values()
    assert (rounded.ratio_min, rounded.ratio_max) == (1, 1)
    assert rounded.mean_entropy == pytest.approx(exact.mean_entropy, rel=0.02)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)


def test_scoring_without_a_mismatch(mesh):
    """Sampled log-probabilities that the policy itself gives: nothing between sampling and training."""
    config = stage(ObjectiveConfig(), mini=1)
    actor = build_actor(mesh, config)
    (batch,) = batches(config)
    (scored,) = actor.score([batch], config)
    assert scored.mismatch.largest > 1, "the example's sampled_logprobs are not log-probabilities"
    logprobs = {}
    for micro in scored.micro:
        parts = micro.old_logprob_R.split([len(batch.sequences[index].response) for index in micro.indices])
        logprobs |= {index: part.numpy() for index, part in zip(micro.indices, parts, strict=True)}
    sequences = [replace(sequence, sampled_logprobs=logprobs[index]) for index, sequence in enumerate(batch.sequences)]
    (scored,) = actor.score([replace(batch, sequences=tuple(sequences))], config)
    assert scored.mismatch.largest == scored.mismatch.gap_sum == 0


def test_recovered_responses_do_not_count_as_mismatch(mesh):
    """They were sampled one policy earlier, so their log-probabilities differ by what the policy has learned since."""
    config = stage(ObjectiveConfig(), mini=1)
    actor = build_actor(mesh, config)
    (batch,) = batches(config)
    (all_fresh,) = actor.score([batch], config)
    one_fresh = replace(batch, sequences=tuple(replace(each, fresh=index == 2) for index, each in enumerate(batch.sequences)))
    (scored,) = actor.score([one_fresh], config)
    assert one_fresh.fresh_tokens == len(batch.sequences[2].response)
    assert 0 < scored.mismatch.gap_sum < all_fresh.mismatch.gap_sum
    assert scored.mean_entropy == all_fresh.mean_entropy


@pytest.mark.parametrize("first", [1, 5, 11])
def test_scoring_in_parts_is_scoring_at_once(mesh, first):
    """What was scored while the rest was sampled: the same sums, and the same gradient to rounding."""
    config = stage(ObjectiveConfig(entropy_target=0.1, entropy_coefficient=0.5, tis_cap=1.2), mini=1)
    (batch,) = batches(config)
    results = []
    for parts in ([batch], [MiniBatch(batch.sequences[:first]), MiniBatch(batch.sequences[first:])]):
        actor = build_actor(mesh, config)
        scoring = Scoring(actor, config, token_bound=0.5)
        for part in parts:
            scoring.add(part)
        scored = scoring.finish(batch)
        shift_old([scored])
        sums = actor._gradient_pass(scored, config, 1.0, lambda *_: None)
        results.append((scored, sums, whole_gradients(actor.policy)))
    (one, sums, gradients), (two, sums_of_parts, gradients_of_parts) = results
    assert two.mean_entropy == pytest.approx(one.mean_entropy, rel=1e-6)
    assert two.mismatch.gap_sum == pytest.approx(one.mismatch.gap_sum, rel=1e-6)
    assert (two.mismatch.tokens, two.mismatch.beyond) == (one.mismatch.tokens, one.mismatch.beyond)
    assert (two.tis_weight, two.tis_capped) == pytest.approx((one.tis_weight, one.tis_capped), rel=1e-6)
    assert sums_of_parts == pytest.approx(sums, rel=1e-5, abs=1e-6)
    assert difference(gradients_of_parts, gradients) < 1e-5


def test_truncated_importance_weights_scale_the_policy_term_alone(mesh):
    """By hand: each token's advantage times min(exp(recomputed - sampled), cap); the entropy term and the clip stay."""
    for cap in (0.9, 1.05, 50.0):
        config = stage(ObjectiveConfig(tis_cap=cap), mini=1)
        actor = build_actor(mesh, config)
        (scored,) = actor.score(batches(config), config)
        for micro in scored.micro:
            plain = loss_inputs(micro, stage(ObjectiveConfig(), mini=1), 0.25)
            weighted = loss_inputs(micro, config, 0.25)
            ratio = np.minimum(np.exp(micro.old_logprob_R.numpy() - micro.sampled_logprob_R.numpy()), cap)
            np.testing.assert_allclose(weighted.advantage_T.numpy(), plain.advantage_T.numpy() * ratio, rtol=1e-6)
            assert weighted.entropy_weight == plain.entropy_weight == 0.25
            assert not weighted.advantage_T.requires_grad
    assert plain.advantage_T is micro.advantage_R, "without a cap nothing is touched"
