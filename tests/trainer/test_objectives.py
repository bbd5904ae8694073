"""Each objective, from groups to the loss and its gradient, against numbers worked out by hand.

The example: two questions, three outputs each, with these probabilities of the sampled tokens under the new and the old policy.

    output  R   new / old per token             ratio r
    A1      1   .6/.4                           1.5
    A2      1   .5/.4  .2/.4                    1.25  0.5
    A3     -1   .35/.5  .8/.5  .5/.5            0.7   1.6   1.0
    B1      1   .55/.5  .25/.25                 1.1   1.0
    B2     -1   .3/.4                           0.75
    B3     -1   .45/.5  .6/.5                   0.9   1.2

The loss is computed twice: by the definition from the log-probabilities, and by the loss head from hidden states that are the
logits, through an output weight that is the identity.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.linear_policy_loss import linear_policy_loss
from rollout.types import Group, Prompt, Sample, Verdict
from trainer.actor import loss_inputs
from trainer.batch import MicroBatch, collate, mini_batches
from trainer.config import BatchConfig, DataConfig, ObjectiveConfig, PromptsFile, SamplingConfig, StageConfig

EXAMPLE = (
    (1, ((0.6, 0.4),)),
    (1, ((0.5, 0.4), (0.2, 0.4))),
    (-1, ((0.35, 0.5), (0.8, 0.5), (0.5, 0.5))),
    (1, ((0.55, 0.5), (0.25, 0.25))),
    (-1, ((0.3, 0.4),)),
    (-1, ((0.45, 0.5), (0.6, 0.5))),
)
NEW, OLD = (torch.tensor([pair[at] for _, tokens in EXAMPLE for pair in tokens], dtype=torch.float64) for at in (0, 1))
VOCABULARY = 4


def stage(mini: int = 1, temperature: float = 1.0, context: int = 20, **objective) -> StageConfig:
    return StageConfig(
        name="example",
        steps=1,
        context=context,
        data=DataConfig(train=PromptsFile(path=Path("prompts.jsonl")), max_prompt_tokens=10),
        batch=BatchConfig(groups=2, group_size=3, mini_batches=mini),
        sampling=SamplingConfig(temperature=temperature),
        objective=ObjectiveConfig(**objective),
    )


def group(outputs) -> Group:
    """The tokens are 0, 1, 2, 3, 0, … in each response."""
    samples, verdicts = [], []
    for reward, tokens in outputs:
        ids = np.arange(len(tokens), dtype=np.int32) % VOCABULARY
        samples.append(Sample(ids, np.zeros(len(tokens), dtype=np.float32), "stop", 0))
        verdicts.append(Verdict(reward == 1, "right" if reward == 1 else "wrong"))
    prompt = np.array([1, 2], dtype=np.int32)
    return Group(Prompt("q", "?", "!"), prompt, tuple(samples), tuple(verdicts), 0)


def example(config: StageConfig) -> MicroBatch:
    batch = mini_batches([group(EXAMPLE[:3]), group(EXAMPLE[3:])], config, step=0)
    assert len(batch) == 1
    micro = collate(batch[0].sequences, torch.device("cpu"))
    micro.old_logprob_R = OLD.log()
    return micro


def logits_of(probability_R: Tensor, labels_R: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits under which each label has the given probability at this temperature; the other tokens share the rest."""
    rest = (1 - probability_R).unsqueeze(1) / (VOCABULARY - 1)
    p_RV = rest.expand(-1, VOCABULARY).scatter(1, labels_R.unsqueeze(1), probability_R.unsqueeze(1))
    return temperature * p_RV.log() + 3.0


def by_definition(micro: MicroBatch, config: StageConfig) -> reference.ClippedPolicyLoss:
    objective = config.objective
    return reference.clipped_policy_loss(
        NEW.log(),
        micro.old_logprob_R,
        micro.advantage_R,
        micro.weight_R,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        ref_logprob_T=micro.ref_logprob_R,
        kl_coefficient=objective.kl_coefficient,
    )


def by_head(micro: MicroBatch, config: StageConfig):
    hidden = logits_of(NEW, micro.labels_R, config.sampling.temperature).requires_grad_()
    result = linear_policy_loss(hidden, torch.eye(VOCABULARY, dtype=torch.float64), loss_inputs(micro, config, 0.0))
    result.loss.backward()
    return result, hidden.grad


def check(config: StageConfig, loss: float, d_logprob: list[float], clipped: tuple[int, int], micro: MicroBatch | None = None):
    """The literals against both computations. The head's gradient: d loss / d logit_label = d loss / d logprob · (1 - p) / T."""
    micro = micro or example(config)
    definition = by_definition(micro, config)
    assert definition.loss.item() == pytest.approx(loss, abs=2e-7)
    assert definition.d_logprob_T.tolist() == pytest.approx(d_logprob, abs=2e-7)
    assert (definition.clipped_low.item(), definition.clipped_high.item()) == clipped
    head, d_logits = by_head(micro, config)
    assert head.loss.item() == pytest.approx(loss, abs=2e-7)
    assert head.policy_loss.item() == pytest.approx(loss, abs=2e-7)
    assert head.logprob_T.tolist() == pytest.approx(NEW.log().tolist(), abs=1e-12)
    assert (head.clipped_low.item(), head.clipped_high.item()) == clipped
    at_label = d_logits.gather(1, micro.labels_R.unsqueeze(1)).squeeze(1)
    scale = (1 - NEW) / config.sampling.temperature
    assert at_label.tolist() == pytest.approx((torch.tensor(d_logprob, dtype=torch.float64) * scale).tolist(), abs=2e-7)
    return head


GRPO_D_LOGPROB = [
    # a = 0.577349769 (test_advantage.py). -r · A / (6 · n); 0 where the clip holds.
    0.0,  # A1: 1.5 above 1.2, A > 0
    0.0,  # A2: 1.25 above 1.2, A > 0
    -0.024056240,  #  -0.5 a / 12: below 0.8, but with A > 0 the ratio is free
    0.0,  # A3: 0.7 below 0.8, A < 0
    0.102639959,  #  1.6 · 2 a / 18
    0.064149974,  #  1.0 · 2 a / 18
    -0.105847458,  # B1: -1.1 · 2 a / 12
    -0.096224962,  #  -1.0 · 2 a / 12
    0.0,  # B2: 0.75 below 0.8, A < 0
    0.043301233,  # B3: 0.9 a / 12
    0.057734977,  #  1.2 a / 12
]


def test_grpo():
    # A = +a, +a, -2a for A1 to A3 and +2a, -a, -a for B1 to B3. Per output the mean of min(r A, clip(r, 0.8, 1.2) A):
    #   A1 1.2 a;  A2 (1.2 + 0.5) a / 2 = 0.85 a;  A3 -(0.8 + 1.6 + 1.0) 2a / 3 = -2.266667 a
    #   B1 (1.1 + 1.0) 2a / 2 = 2.1 a;  B2 -0.8 a;  B3 -(0.9 + 1.2) a / 2 = -1.05 a
    # Their mean over 6 outputs is 0.033333 a / 6 = 0.005555556 · 0.577349769 = 0.003207499; the loss is minus that.
    check(stage(), -0.003207499, GRPO_D_LOGPROB, (2, 2))


def test_temperature_stands_inside_the_log_probability():
    check(stage(temperature=0.5), -0.003207499, GRPO_D_LOGPROB, (2, 2))
    # Logits (1, 0), T = 0.5: log p = -log(1 + e^-2) = -0.126928011, not -log(1 + e^-1) / 0.5.
    config = stage(temperature=0.5)
    micro = collate(mini_batches([group([(1, ((1, 1),)), (-1, ((1, 1),))])], config, step=0)[0].sequences, torch.device("cpu"))
    micro.old_logprob_R = torch.zeros(2, dtype=torch.float64)
    hidden = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    result = linear_policy_loss(hidden, torch.eye(2, dtype=torch.float64), loss_inputs(micro, config, 0.0))
    assert result.logprob_T.tolist() == pytest.approx([-0.126928011] * 2, abs=1e-9)


DAPO = {"loss_aggregation": "token_sum", "divisor": 10.0, "clip_low": 0.2, "clip_high": 0.28}


def test_dapo_with_pshw():
    # min(r A, clip(r, 0.8, 1.28) A) summed over tokens, A from test_advantage.py:
    #   A1, A2: (1.28 + 1.25 + 0.5) · 0.780444444 = 2.364746667      A3: -(0.8 + 1.6 + 1.0) · 1.560888889 = -5.307022222
    #   B1: (1.1 + 1.0) · 1.788444444 = 3.755733333
    #   B2: -0.8 · 0.894222222 = -0.715377778                          B3: -(0.9 + 1.2) · 0.894222222 = -1.877866667
    # Together -1.779786667; by the divisor 10, negated.
    d_logprob = [
        0.0,  # -r · A / 10
        -0.097555556,  # 1.25 is inside 1.28
        -0.039022222,
        0.0,
        0.249742222,
        0.156088889,
        -0.196728889,
        -0.178844444,
        0.0,
        0.080480000,
        0.107306667,
    ]
    check(stage(advantage="pshw", **DAPO), 0.177978667, d_logprob, (2, 1))


def test_dapo_clips_each_side_by_its_own_bound():
    # As above with the two bounds exchanged, clip(r, 0.72, 1.2): 1.25 is held at 1.2, and 0.7 at 0.72, but 0.75 is free.
    #   A1, A2: (1.2 + 1.2 + 0.5) · 0.780444444 = 2.263288889      A3: -(0.72 + 1.6 + 1.0) · 1.560888889 = -5.182151111
    #   B1: 3.755733333      B2: -0.75 · 0.894222222 = -0.670666667      B3: -1.877866667      together -1.711662222
    config = stage(advantage="pshw", **(DAPO | {"clip_low": 0.28, "clip_high": 0.2}))
    definition = by_definition(example(config), config)
    assert definition.loss.item() == pytest.approx(0.171166222, abs=2e-7)
    assert by_head(example(config), config)[0].loss.item() == pytest.approx(0.171166222, abs=2e-7)
    assert (definition.clipped_low.item(), definition.clipped_high.item()) == (1, 2)


def test_dapo_with_the_plain_advantage():
    # 3.03 · 2/3 - 3.4 · 4/3 + 2.1 · 4/3 - 0.8 · 2/3 - 2.1 · 2/3 = 2.02 - 4.533333 + 2.8 - 0.533333 - 1.4 = -1.646666667
    config = stage(advantage="centered", **DAPO)
    assert by_definition(example(config), config).loss.item() == pytest.approx(0.164666667, abs=2e-7)
    assert by_head(example(config), config)[0].loss.item() == pytest.approx(0.164666667, abs=2e-7)


def test_the_divisor_only_scales():
    config = stage(advantage="pshw", **(DAPO | {"divisor": 40.0}))
    assert by_head(example(config), config)[0].loss.item() == pytest.approx(0.177978667 / 4, abs=1e-7)


def test_kl_to_the_reference():
    # The reference gives the third token of A3 twice the policy's probability and the second of B1 half of it, else the same:
    # k3 = 2 - 1 - log 2 = 0.306852819 and 0.5 - 1 + log 2 = 0.193147181, together 0.5. Their gradients by the policy's
    # log-probability are 1 - 2 = -1 and 1 - 0.5 = 0.5. With coefficient 0.1 and divisor 10 they weigh 0.01.
    config = stage(advantage="pshw", kl_coefficient=0.1, **DAPO)
    micro = example(config)
    gap = torch.zeros_like(NEW)
    gap[5], gap[7] = math.log(2), -math.log(2)
    micro.ref_logprob_R = NEW.log() + gap
    d_logprob = [0.0, -0.097555556, -0.039022222, 0.0, 0.249742222, 0.156088889 - 0.01, -0.196728889, -0.178844444 + 0.005]
    head = check(config, 0.177978667 + 0.005, [*d_logprob, 0.0, 0.08048, 0.107306667], (2, 1), micro)
    assert head.ref_kl_sum.item() == pytest.approx(0.5, abs=1e-12)


def test_statistics():
    # k3 of KL(old ‖ new) is r - 1 - log r: over the ratios of the example their sum is
    #   sum(r - 1) = 11.5 - 11 = 0.5, sum(log r) = log(1.5 · 1.25 · 0.5 · 0.7 · 1.6 · 1.1 · 0.75 · 0.9 · 1.2) = log(0.935550)
    head, _ = by_head(example(stage()), stage())
    assert head.kl_sum.item() == pytest.approx(0.5 - math.log(0.93555), abs=1e-6)
    assert head.ratio_max.item() == pytest.approx(1.6, abs=1e-12)
    assert head.ratio_min.item() == pytest.approx(0.5, abs=1e-12)
    assert head.ref_kl_sum.item() == 0


@pytest.mark.parametrize(("aggregation", "share"), [("response_mean", 1 / 3), ("token_sum", None)])
def test_what_length_does_to_a_responses_share(aggregation, share):
    """GRPO gives every response 1/6 of the loss whatever its length. DAPO gives every token the same, whoever is beside it."""
    config = stage(loss_aggregation=aggregation)
    short = mini_batches([group([(1, ((1, 1),) * 2), (-1, ((1, 1),) * 4), (-1, ((1, 1),) * 3)])], config, step=0)[0].sequences
    long = mini_batches([group([(1, ((1, 1),) * 4), (-1, ((1, 1),) * 4), (-1, ((1, 1),) * 3)])], config, step=0)[0].sequences
    totals = [[s.weight * len(s.response) for s in sequences] for sequences in (short, long)]
    if share is not None:
        assert totals == [pytest.approx([share] * 3)] * 2
    else:
        # The constant is 3 responses × a limit of 20 - 10 tokens = 30, and the others' shares do not move.
        assert totals == [pytest.approx([2 / 30, 4 / 30, 3 / 30]), pytest.approx([4 / 30, 4 / 30, 3 / 30])]


def test_mini_batches_cut_the_groups_and_normalise_by_themselves():
    cut = mini_batches([group(EXAMPLE[:3]), group(EXAMPLE[3:])], stage(mini=2), step=0)
    assert [[len(s.response) for s in batch.sequences] for batch in cut] == [[1, 2, 3], [2, 1, 2]]
    assert [s.weight for s in cut[0].sequences] == pytest.approx([1 / 3, 1 / 6, 1 / 9]), "1 / (3 responses · n)"
    assert [s.advantage for s in cut[1].sequences] == pytest.approx([1.154699538, -0.577349769, -0.577349769])
    token_sum = mini_batches(
        [group(EXAMPLE[:3]), group(EXAMPLE[3:])], stage(mini=2, loss_aggregation="token_sum", context=60), step=0
    )
    assert {s.weight for batch in token_sum for s in batch.sequences} == {1 / (3 * 50)}


def test_groups_that_cannot_be_cut_equally_are_refused():
    with pytest.raises(ValueError, match=r"3 cannot be cut into batch\.mini_batches 2"):
        mini_batches([group(EXAMPLE[:3])] * 3, stage(mini=2), step=0)


def test_collate_predicts_each_response_token_from_the_position_before_it():
    config = stage()
    micro = collate(mini_batches([group(EXAMPLE[:3]), group(EXAMPLE[3:])], config, step=0)[0].sequences, torch.device("cpu"))
    assert micro.input_ids_T.tolist()[:7] == [1, 2, 0, 1, 2, 0, 1], "prompt (1, 2), response (0); prompt (1, 2), response (0, 1)"
    assert micro.position_ids_T.tolist()[:7] == [0, 1, 2, 0, 1, 2, 3]
    assert micro.rows_R.tolist()[:3] == [1, 4, 5]
    assert torch.equal(micro.input_ids_T[micro.rows_R + 1], micro.labels_R)
    assert len(micro.labels_R) == len(micro.advantage_R) == len(micro.weight_R) == 11
