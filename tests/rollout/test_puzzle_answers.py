"""What reasoning-gym's scorers would execute is refused before; each puzzle's ground truth and other honest forms are not."""

import time

import pytest

from rollout.reward.puzzle_answers import LONGEST, misuse, refusal
from rollout.reward.rules import reasoning_gym as score

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


@pytest.mark.parametrize(
    ("puzzle", "answer", "why"),
    [
        ("puzzle24", "8*3*1*1", "the numbers 1, 1, 3, 8, not 2, 3, 4, 6"),
        ("puzzle24", "2*3*4", "the numbers 2, 3, 4, not 2, 3, 4, 6"),
        ("puzzle24", "2*3*4 + 6 - 6", "the numbers 2, 3, 4, 6, 6, not"),
        ("puzzle24", "", "the numbers none, not"),
        ("puzzle24", "2*3*4*6" + "6" * 5000, "the numbers 2, 3, 4, 666"),
        ("countdown", "24e0+0e0*(2+3+4+6)", "'e' is"),
        ("countdown", "(2+3+4+6)*E/E", "'E' is"),
        ("countdown", "24.0 + 0*(2+3+4+6)", "'.' is"),
        ("countdown", "(2 + 3)*4! + 6", "'!' is"),
        ("countdown", "(2 ^ 3)*4 - 6", "'^' is"),
        ("countdown", "2**3*4 - 6", "'**' is"),
        ("countdown", "2* \n*3*4 - 6", "'* \\n*' is"),
        ("countdown", "6//4*2*3", "'//' is"),
        ("countdown", "６*4*(3 - 2)", "'６' is"),
        ("countdown", "6*4*(3 - 2)²", "'²' is"),
    ],
)
def test_arithmetic_with_other_numbers_or_signs(puzzle, answer, why):
    assert why in (misuse(puzzle, answer, {"numbers": [4, 2, 6, 3]}) or "")


@pytest.mark.parametrize("puzzle", ["puzzle24", "countdown"])
def test_arithmetic_that_uses_each_number_once(puzzle):
    for answer in ("6*4*(3 - 2)", "\n( 6 *4)/( 3-2 )\t", "-(2 - 3)*6*4"):
        assert misuse(puzzle, answer, {"numbers": [4, 2, 6, 3]}) is None
    assert misuse("simple_integration", "E/E", {}) is None


@pytest.mark.parametrize("puzzle", ["puzzle24", "countdown"])
def test_only_a_solution_of_the_puzzle_itself_is_right(puzzle):
    """What is right for every puzzle to the scorer alone, over generated puzzles, beside each one's own solution."""
    import reasoning_gym
    from reasoning_gym import get_score_answer_fn

    fooled = 0
    for entry in reasoning_gym.create_dataset(puzzle, size=60, seed=5):
        numbers, target = entry["metadata"]["numbers"], entry["metadata"].get("target", 24)
        assert score(entry["answer"], entry["answer"], entry)[0], entry["answer"]
        assert score(entry["answer"], f" ({entry['answer']}) ", entry)[0]
        total = "+".join(map(str, numbers))
        for answer in ("8*3*1*1", "6*4*1*1", f"{target}e0+0e0*({total})", f"({total})*E/E"):
            if sorted(numbers) not in ([1, 1, 3, 8], [1, 1, 4, 6]):
                right, reason, _ = score(entry["answer"], answer, entry)
                assert (right, reason) == (False, "wrong"), answer
                fooled += get_score_answer_fn(puzzle)(answer=answer, entry=entry) == 1.0
    assert fooled >= 60


@pytest.mark.parametrize(
    ("puzzle", "numbers", "target", "answer", "right"),
    [
        ("puzzle24", [7, 7, 2, 1], 24, "(7*7 - 1)/2", True),
        ("puzzle24", [7, 7, 2, 1], 24, "7*7/2*1", False),
        ("puzzle24", [3, 3, 8, 8], 24, "8/(3 - 8/3)", True),
        ("countdown", [100, 9, 1, 91, 99], 900, "100*9 + 1/(91*99)", False),
        ("countdown", [100, 9, 99, 91, 8], 900, "100*9*(99 - 91)/8", True),
    ],
)
def test_nearly_the_target_is_wrong(puzzle, numbers, target, answer, right):
    """The scorer of puzzle24 cuts 24.5 down to 24, and that of countdown allows a hundred-thousandth."""
    entry = {"question": "?", "answer": "", "metadata": {"source_dataset": puzzle, "numbers": numbers, "target": target}}
    assert score("", answer, entry)[:2] == (right, "right" if right else "wrong")


GAME = "game_of_life_halting"


@pytest.mark.parametrize(
    ("puzzle", "gold", "answer", "right"),
    [
        (GAME, "False", "False", True),
        (GAME, "True", " true\n", True),
        (GAME, "False", "True", False),
        (GAME, "True", "False", False),
        (GAME, "False", "0", False),
        (GAME, "True", "x", False),
        (GAME, "True", "True False", False),
        ("complex_arithmetic", "8.0 + 3.0i", "8+3i", True),
        ("complex_arithmetic", "8.0 + 3.0i", "(8 + 3j)", True),
        ("complex_arithmetic", "8.0 + 3.0i", "8+4i", False),
        ("complex_arithmetic", "8.0 + 3.0i", "nan", False),
        ("complex_arithmetic", "8.0 + 3.0i", " -NaN ", False),
        ("complex_arithmetic", "8.0 + 3.0i", "n an", False),
        ("complex_arithmetic", "8.0 + 3.0i", "nanj", False),
        ("complex_arithmetic", "8.0 + 3.0i", "nan+nanj", False),
        ("complex_arithmetic", "8.0 + 3.0i", "8+nani", False),
        ("complex_arithmetic", "8.0 + 3.0i", "nan+3i", False),
        ("complex_arithmetic", "8.0 + 3.0i", "ｎａｎ", False),
        ("complex_arithmetic", "8.0 + 3.0i", "1e999", False),
        ("coin_flip", "0.3125", "0.3125", True),
        ("coin_flip", "0.3125", " 5/16 ", True),
        ("coin_flip", "0.3125", ".3125", True),
        ("coin_flip", "0.3125", "3.125e-1", True),
        ("coin_flip", "3.051757812e-05", "1/32768", True),
        ("coin_flip", "3.051757812e-05", "0.000030517578125", True),
        ("coin_flip", "0.1208953857", "3961.5/32768", False),
        ("coin_flip", "0.3125", "0", False),
        ("coin_flip", "0.3125", "0.", False),
        ("coin_flip", "0.3125", "0/1", False),
        ("coin_flip", "0.3125", "0.3", False),
        ("coin_flip", "0.3125", "0.31251", False),
        ("coin_flip", "0.3125", "1/0", False),
        ("coin_flip", "3.051757812e-05", "0.00003", False),
        ("coin_flip", "3.051757812e-05", "1e-4", False),
        ("coin_flip", "3.051757812e-05", "0", False),
    ],
)
def test_what_a_scorer_takes_beside_the_answer_is_wrong(puzzle, gold, answer, right):
    """Of one that asks whether both texts are empty, one that takes what is no number for near, and one that rewards a prefix."""
    entry = {"question": "?", "answer": gold, "metadata": {"source_dataset": puzzle, "result": (8.0, 3.0)}}
    assert score(gold, answer, entry)[:2] == (right, "right" if right else "wrong")


def test_no_number_is_a_word_where_words_are_asked_for():
    assert refusal("word_ladder", "man,nan,nap", "man,map,nap") is None
    assert refusal("letter_counting", "banana, info", "3") is None
    assert refusal("complex_arithmetic", "inf", "inf") is None
    assert "'Infinity' is no number" in refusal("number_format", "-Infinity", "3")


@pytest.mark.parametrize("loop", ["a", "1", "a.", "a ", "f(", ". ", "\\", ")", "x_", "1.e"])
def test_a_long_answer_takes_no_time(loop):
    """A gold that is long allows long answers; one pass over 60,000 characters takes milliseconds."""
    answer = loop * (60_000 // len(loop))
    start = time.process_time()
    refusal("spiral_matrix", answer, "1" * 20_000)
    assert time.process_time() - start < 0.5
