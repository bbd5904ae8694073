"""What reasoning-gym's scorers would execute is refused before; each puzzle's ground truth and other honest forms are not."""

import time

import pytest

from rollout.reward.puzzle_answers import LONGEST, refusal

POISON = (
    '[setattr(__import__("reasoning_gym.algorithmic.spiral_matrix",fromlist=["a"]).SpiralMatrixDataset,'
    '"score_answer",lambda self,answer,entry:1.0)]'
)


@pytest.mark.parametrize(
    ("puzzle", "answer", "gold", "why"),
    [
        ("simple_integration", "integrate(-36*x**7/5 + 20*x/9, x)", "x**2 + C", "'integrate'"),
        ("simple_integration", "integrate \n (x, x)", "x**2 + C", "'integrate'"),
        ("simple_integration", "2integrate(x, x)", "x**2 + C", "'integrate'"),
        ("simple_integration", "ｉntegrate(x, x)", "x**2 + C", "'integrate'"),
        ("simple_integration", "(integrate)(x, x)", "x**2 + C", "calls a value"),
        ("simple_integration", '"integrate" + "(x, x)"', "x**2 + C", "'\"' in a formula"),
        ("simple_integration", "[x]", "x**2 + C", "'[' in a formula"),
        ("simple_integration", "x.diff", "x**2 + C", "'diff'"),
        ("intermediate_integration", "Integral(x, x)", "Integral(x, x)", "'Integral'"),
        ("intermediate_integration", "integrate(x, x)", "asin(x)", "'integrate'"),
        ("polynomial_multiplication", "expand(21*x*(61*x**3+78*x+9))", "1281*x**4", "'expand'"),
        ("countdown", "4*6 or 3 or 1", "4*6*(3 - 2)", "'or' in a formula"),
        ("spiral_matrix", POISON, "8", "'__'"),
        ("spiral_matrix", "[print (8)]", "8", "'print'"),
        ("spiral_matrix", "[(8) . real]", "8", "'real'"),
        ("spiral_matrix", "[8.\nreal]", "8", "'real'"),
        ("spiral_matrix", "[1. .real]", "8", "'real'"),
        ("spiral_matrix", "[print # (\n(8)]", "8", "'#'"),
        ("spiral_matrix", "[print \\\n(8)]", "8", "'\\\\'"),
        ("spiral_matrix", "[＿＿debug＿＿]", "8", "'__'"),
        ("spiral_matrix", "[lambda: 8]", "8", "'lambda'"),
        ("spiral_matrix", "[x := 8]", "8", "':='"),
        ("spiral_matrix", "import os", "8", "'import'"),
        ("spiral_matrix", "8" * (LONGEST + 5), "8", "4101 characters"),
    ],
)
def test_refused(puzzle, answer, gold, why):
    assert why in (refusal(puzzle, answer, gold) or "")


@pytest.mark.parametrize(
    ("puzzle", "answer", "gold"),
    [
        ("simple_integration", "1.e2*x**2 + sin(x)/2 + (x + 1)*(x - 1) + C", "x"),
        ("intermediate_integration", "2*exp(x)*sqrt(x) - log(abs(x))", "x"),
        ("intermediate_integration", "erf(x)", "2*erf(x)"),
        ("countdown", "(82 + 20)*67 - 50", "x"),
        ("spiral_matrix", "[1, 2.5, 3]", "1 2"),
        ("n_queens", "[['_', 'Q'], ['Q', '_']]", "_ Q\nQ _"),
        ("ab", "#A B#", "B# #A"),
        ("knights_knaves", "Lily is one. Zoey is none", "Zoey is none. Lily. Zoey is"),
        ("boxnet", '[{"agent[0.5, 0.5]": "move(box_blue, square[0.5, 1.5])"}]', "None"),
        ("propositional_logic", "(P ∧ (Q → ¬(R)))", "None"),
        ("complex_arithmetic", "8.0 + 3.0i", "8.0 + 3.0i"),
        ("tower_of_hanoi", "8" * (LONGEST + 8), "88"),
    ],
)
def test_let_through(puzzle, answer, gold):
    assert refusal(puzzle, answer, gold) is None


def test_every_puzzles_own_ground_truth_is_let_through():
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    seen = 0
    for puzzle in sorted(set(DATASETS) - {"composite", "arc_agi", "rearc", "acre"}):
        for item in reasoning_gym.create_dataset(puzzle, size=3, seed=3):
            answer = item["answer"]
            if isinstance(answer, str) and "Integral(" not in answer:
                seen += 1
                assert refusal(puzzle, answer, answer) is None, f"{puzzle}: {answer}"
    assert seen > 200


@pytest.mark.parametrize("loop", ["a", "1", "a.", "a ", "f(", ". ", "\\", ")", "x_", "1.e"])
def test_a_long_answer_takes_no_time(loop):
    """A gold that is long allows long answers; one pass over 60,000 characters takes milliseconds."""
    answer = loop * (60_000 // len(loop))
    start = time.process_time()
    refusal("spiral_matrix", answer, "1" * 20_000)
    assert time.process_time() - start < 0.5
