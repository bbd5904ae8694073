"""Advantages against numbers worked out by hand for the groups (1, 1, -1) and (1, -1, -1)."""

import pytest

from trainer.advantage import ADVANTAGES, advantages
from trainer.config import ObjectiveConfig

EASY, HARD = (1, 1, -1), (1, -1, -1)


def computed(rewards, **objective) -> list[float]:
    return advantages(rewards, ObjectiveConfig(**objective))


def test_grpo():
    # (1, 1, -1): μ = 1/3, R - μ = 2/3, 2/3, -4/3; their squares sum to 24/9, over G - 1 = 2 that is 4/3; std = 1.154700538.
    # 0.666666667 / (1.154700538 + 0.000001) = 0.577349769, and minus twice that for the wrong one.
    assert computed(EASY) == pytest.approx([0.577349769, 0.577349769, -1.154699538], rel=1e-8)
    # (1, -1, -1): the mirror image.
    assert computed(HARD) == pytest.approx([1.154699538, -0.577349769, -0.577349769], rel=1e-8)


def test_grpo_with_the_population_std():
    # 24/9 over G = 3 is 8/9; std = 0.942809042; 0.666666667 / 0.942810042 = 0.707106031
    assert computed(EASY, std_correction=0) == pytest.approx([0.707106031, 0.707106031, -1.414212062], rel=1e-8)


def test_centered():
    assert computed(EASY, advantage="centered") == pytest.approx([2 / 3, 2 / 3, -4 / 3], rel=1e-12)
    assert computed(HARD, advantage="centered") == pytest.approx([4 / 3, -2 / 3, -2 / 3], rel=1e-12)


def test_pshw():
    # D = 1.256 - 0.256 / 3 = 1.170666667 for μ = 1/3: 2/3 · D = 0.780444444
    assert computed(EASY, advantage="pshw") == pytest.approx([0.780444444, 0.780444444, -1.560888889], rel=1e-9)
    # D = 1.256 + 0.256 / 3 = 1.341333333 for μ = -1/3: 4/3 · D = 1.788444444
    assert computed(HARD, advantage="pshw") == pytest.approx([1.788444444, -0.894222222, -0.894222222], rel=1e-9)


def test_pshw_weighs_a_question_from_1_to_1_512():
    # One wrong of 1000: μ = 0.998, D = 1.256 - 0.255488 = 1.000512, the right ones get 0.002 · D.
    assert computed([1] * 999 + [-1], advantage="pshw")[0] == pytest.approx(0.002001024, rel=1e-9)
    # One right of 1000: μ = -0.998, D = 1.256 + 0.255488 = 1.511488, the right one gets 1.998 · D.
    assert computed([1] + [-1] * 999, advantage="pshw")[0] == pytest.approx(3.019953024, rel=1e-9)


def test_pshw_takes_its_constants_from_the_configuration():
    # (1, 1, -1) with D = 2 - 0.6 · 1/3 = 1.8: 2/3 · 1.8 = 1.2
    assert computed(EASY, advantage="pshw", pshw_alpha=-0.6, pshw_base=2.0) == pytest.approx([1.2, 1.2, -2.4], rel=1e-12)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("rewards", [(1, 1, 1), (-1, -1)])
def test_a_uniform_group_teaches_nothing(advantage, rewards):
    assert computed(rewards, advantage=advantage) == [0.0] * len(rewards)
