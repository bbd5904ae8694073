"""How close two models are: each formula by an example that can be worked by hand."""

import math

import numpy as np
import pytest
import torch

from benchmarks.agreement import greedy_agreement, identical_prefix, kind_of, logit_error, paired_accuracy, weight_error
from rollout.vllm.engine import Scores


def logs(*probabilities: float) -> np.ndarray:
    return np.log(np.asarray(probabilities, dtype=np.float32))


def test_logit_error_of_three_tokens():
    """d = -ln 2, ln 2, 0, so k3 = ((1/2 - 1 + ln 2) + (2 - 1 - ln 2) + 0) / 3 = 1/6."""
    found = logit_error([logs(0.5, 0.25), logs(0.125)], [logs(0.25, 0.5), logs(0.125)])
    assert found == pytest.approx(
        {"tokens": 3, "mean": 2 * math.log(2) / 3, "p999": math.log(2), "max": math.log(2), "k3": 1 / 6, "kl": 0}, abs=1e-6
    )


def test_the_estimates_of_the_divergence_are_of_the_base_from_the_export():
    """Base 1/2, 1/2; export 1/4, 3/4. KL(base ‖ export) = ½ ln 2 + ½ ln ⅔ = 0.1438; the other direction is 0.1308."""
    found = logit_error([logs(0.5, 0.5)], [logs(0.25, 0.75)])
    assert found["kl"] == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)
    assert found["k3"] == pytest.approx(0.5 * math.log(4 / 3), abs=1e-6)  # the two tokens as often as the base draws them


def test_the_percentile_is_what_999_of_a_thousand_do_not_exceed():
    base = [np.zeros(1000, np.float32)]
    one, two = np.full(1000, -0.25, np.float32), np.full(1000, -0.25, np.float32)
    one[7], two[7:9] = 5, 5
    assert logit_error(base, [one])["p999"] == 0.25
    assert logit_error(base, [two])["p999"] == 5
    assert logit_error(base, [one])["max"] == logit_error(base, [-one])["max"] == 5


def test_scores_that_do_not_correspond_are_no_error_measure():
    with pytest.raises(ValueError, match="different lengths"):
        logit_error([logs(0.5, 0.5), logs(0.5)], [logs(0.5), logs(0.5, 0.5)])
    with pytest.raises(ValueError, match="no tokens"):
        logit_error([], [])


@pytest.mark.parametrize(("first", "second", "length"), [
    ([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([9, 2], [1, 2], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 2], 2),
])  # fmt: skip
def test_the_identical_prefix_ends_at_the_first_difference(first, second, length):
    assert identical_prefix(np.asarray(first), np.asarray(second)) == length


def test_greedy_agreement_of_three_prompts():
    """Part after 1 of 3, never in 2, and after 2, where the export goes on and the base does not. Of the base's 7 tokens one is
    not the export's likeliest; one is tied."""
    base = [np.asarray(ids) for ids in ([1, 2, 3], [4, 5], [6, 7])]
    other = [np.asarray(ids) for ids in ([1, 9, 3], [4, 5], [6, 7, 8])]
    one = Scores(np.float32([-0.5, -2.0, -0.25]), np.float32([-0.5, -1.0, -0.25]))
    two = Scores(np.float32([-0.5, -0.5]), np.float32([-0.5, -0.5]))
    found = greedy_agreement(base, other, [one, two, two])
    assert found == pytest.approx({
        "prompts": 3, "identical": 1 / 3, "mean_prefix": 5 / 3, "mean_length": 7 / 3, "prefix_share": 5 / 7, "top_1": 6 / 7,
    })  # fmt: skip
    with pytest.raises(ValueError, match="not of the base's"):
        greedy_agreement(base, other, [two, two, two])


def test_accuracy_is_paired_by_question():
    """Questions 0 and 1 have both: differences -1/2 and 0, mean -1/4, deviation √(1/8), standard error 1/4."""
    found = paired_accuracy({0: 1.0, 1: 0.5, 2: 0.0}, {0: 0.5, 1: 0.5, 3: 1.0})
    assert found == pytest.approx(
        {"questions": 2, "base": 0.75, "export": 0.5, "difference": -0.25, "standard_error": 0.25, "changed": 1}
    )
    assert paired_accuracy({0: 1.0}, {0: 0.0})["standard_error"] is None
    with pytest.raises(ValueError, match="no question"):
        paired_accuracy({0: 1.0}, {1: 1.0})


def test_weight_error_is_pooled_over_the_layers_of_a_kind():
    """Errors 1/2 of ‖(3, 4)‖ = 5, none of ‖(0, 12)‖ = 12: together 1/2 of 13, at worst 1/10."""
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    base = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 12.0]])]
    found = weight_error(
        [(names[0], base[0], torch.tensor([[3.0, 4.5]])), (names[1], base[1], base[1]), ("model.norm.weight", base[0], base[0])]
    )
    assert found["up_proj"] == pytest.approx(
        {"tensors": 2, "relative_error": 0.5 / 13, "worst": 0.1, "worst_name": names[0]}, abs=1e-9
    )
    assert found["norm"]["relative_error"] == 0


def test_a_kind_is_the_layers_name():
    assert kind_of("model.layers.3.self_attn.q_proj.weight") == "q_proj"
    assert kind_of("model.layers.3.self_attn.q_proj.bias") == "q_proj.bias"
    assert kind_of("model.embed_tokens.weight") == "embed_tokens"
