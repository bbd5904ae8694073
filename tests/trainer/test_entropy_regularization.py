"""Targeted Entropy Regularization: the gradient on both sides of the target, the assumed sign, and the mean that is global."""

from dataclasses import asdict, replace

import pytest
import torch
from tiny_policy import Naive, batches, build_actor, difference, one_rank, stage, whole_gradients, whole_weights

from kernels import reference
from kernels.linear_policy_loss import PolicyLossInputs, linear_policy_loss
from trainer.actor import entropy_sign
from trainer.config import ObjectiveConfig

COEFFICIENT = 0.5


@pytest.fixture(scope="module")
def mesh():
    with one_rank() as mesh:
        yield mesh


def full_loss(hidden, weight, inputs: PolicyLossInputs, target: float):
    """policy + coefficient · |mean H - target| by the definitions."""
    logprob, entropy = reference.logprob_entropy(hidden @ weight.T, inputs.labels_T, inputs.temperature)
    policy = reference.clipped_policy_loss(
        logprob, inputs.old_logprob_T, inputs.advantage_T, inputs.weight_T, clip_low=inputs.clip_low, clip_high=inputs.clip_high
    )
    return policy.loss + reference.entropy_regularizer(entropy.mean(), target, COEFFICIENT)


@pytest.mark.parametrize(("offset", "sign"), [(-0.1, 1.0), (0.1, -1.0)])
def test_gradient_on_either_side_of_the_target(offset, sign):
    """Central differences of the whole loss, each entry of the hidden states and the weight, in fp64."""
    tokens, width, vocabulary = 5, 3, 7
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    logprob, entropy = reference.logprob_entropy(hidden @ weight.T, labels, 0.9)
    inputs = PolicyLossInputs(
        labels_T=labels,
        old_logprob_T=logprob - torch.tensor([0.1, -0.1, 0.5, -0.5, 0.0], dtype=torch.float64),
        advantage_T=torch.tensor([1.0, -1.0, 0.7, -0.7, 0.4], dtype=torch.float64),
        weight_T=torch.full((tokens,), 0.2, dtype=torch.float64),
        clip_low=0.2,
        clip_high=0.28,
        temperature=0.9,
    )
    target = entropy.mean().item() + offset
    objective = ObjectiveConfig(entropy_target=target, entropy_coefficient=COEFFICIENT)
    assert entropy_sign(entropy.mean().item(), objective) == sign

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    linear_policy_loss(*leaves, replace(inputs, entropy_weight=sign * COEFFICIENT / tokens)).loss.backward()
    for leaf, which in zip(leaves, (0, 1), strict=True):
        differences = torch.empty(leaf.numel(), dtype=torch.float64)
        for entry in range(leaf.numel()):
            losses = []
            for step in (1e-6, -1e-6):
                moved = [hidden.clone(), weight.clone()]
                moved[which].view(-1)[entry] += step
                losses.append(full_loss(*moved, inputs, target).item())
            differences[entry] = (losses[0] - losses[1]) / 2e-6
        assert leaf.grad.flatten().tolist() == pytest.approx(differences.tolist(), rel=1e-6, abs=1e-8)


def test_the_sign():
    objective = ObjectiveConfig(entropy_target=0.55)
    assert [entropy_sign(mean, objective) for mean in (0.6, 0.55, 0.5)] == [1.0, 0.0, -1.0]
    assert entropy_sign(0.6, ObjectiveConfig()) == 0.0
    assert entropy_sign(0.6, ObjectiveConfig(entropy_target=0.55, entropy_coefficient=0)) == 0.0


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("side", ["above", "below"])
def test_a_wrongly_assumed_sign_changes_nothing(mesh, side, micro):
    """Bitwise the same weights as with the right assumption, and the result says that it was wrong."""
    target = 2.4 if side == "above" else 2.7
    config = stage(ObjectiveConfig(entropy_target=target, entropy_coefficient=COEFFICIENT), micro=micro, mini=1)
    outcomes = {}
    for assumption in ("right", "wrong", "at the target"):
        actor = build_actor(mesh, config)
        (scored,) = actor.score(batches(config), config)
        assert (scored.mean_entropy > target) is (side == "above")
        if assumption == "wrong":
            scored.mean_entropy = 2 * target - scored.mean_entropy
        elif assumption == "at the target":
            scored.mean_entropy = target
        result = actor.update(scored, config)
        assert result.sign_missed is (assumption != "right")
        outcomes[assumption] = whole_weights(actor.policy), asdict(result) | {"sign_missed": None}
    weights, result = outcomes.pop("right")
    for other_weights, other_result in outcomes.values():
        assert other_result == result
        assert all(torch.equal(other_weights[name], weight) for name, weight in weights.items())


def test_the_wrong_sign_would_have_mattered(mesh):
    """The same example trained in earnest towards the other side ends elsewhere: the test above compares something."""
    ends = []
    for target in (2.4, 2.7):
        config = stage(ObjectiveConfig(entropy_target=target, entropy_coefficient=COEFFICIENT), mini=1)
        actor = build_actor(mesh, config)
        (scored,) = actor.score(batches(config), config)
        actor.update(scored, config)
        ends.append(whole_weights(actor.policy))
    assert difference(*ends) > 1e-4


@pytest.mark.parametrize("target", [2.5, 2.58])
def test_the_mean_is_over_all_micro_batches(mesh, target):
    """Two micro-batches, one above and one below the target: the gradient is that of |mean of all - target|.

    The mean of each one's |mean - target| has another gradient, in which the two pull in opposite directions.
    """
    objective = ObjectiveConfig(entropy_target=target, entropy_coefficient=COEFFICIENT)
    config = stage(objective, micro=2)
    batch = batches(config)[0]
    actor = build_actor(mesh, config)
    (scored,) = actor.score([batch], config)
    naive = Naive(batch, config, tied=False, shifted=False)
    parts = [torch.cat([naive.entropies[index] for index in micro.indices]) for micro in scored.micro]
    assert min(part.mean().item() for part in parts) < target < max(part.mean().item() for part in parts)
    tokens = batch.response_tokens
    of_all = reference.entropy_regularizer(naive.mean_entropy, target, COEFFICIENT)
    of_each = sum(reference.entropy_regularizer(part.mean(), target, COEFFICIENT) * len(part) / tokens for part in parts)
    right = naive.gradients(naive.policy.loss + of_all)
    assert difference(naive.gradients(naive.policy.loss + of_each), right) > 1e-2
    assert abs(of_all.item() - of_each.item()) > 0.01 * COEFFICIENT

    actor._gradient_pass(scored, config, entropy_sign(scored.mean_entropy, objective), lambda *_: None)
    assert difference(whole_gradients(actor.policy), right) < 1e-4
    actor.optimizer.zero_grad()
    assert actor.update(scored, config).entropy_loss == pytest.approx(of_all.item(), rel=1e-4)
