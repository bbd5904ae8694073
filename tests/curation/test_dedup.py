"""Exact, fuzzy and semantic: what goes, what must stay, and which row stays."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import embed
from curation.errors import InputError
from curation.ingest import table_of
from curation.options import Options
from curation.steps import fuzzy, semantic
from curation.steps.exact import remove_exact
from curation.steps.fuzzy import remove_fuzzy
from curation.steps.semantic import remove_semantic
from curation.store import COLUMNS, Rows
from tests.curation.conftest import gone

LONG = (
    "Natalia sold clips to {} of her friends in April, and then she sold half as many clips in May. "
    "How many clips did she sell "
    "altogether in April and May, if nobody gave any of the clips back to her before the summer began?"
)


def test_exact_keeps_the_first_of_each_group(rows) -> None:
    table = rows(
        ("What is 2+3?", "5"), ("Other?", "1"), ("what is ２ + 3 ?", "5"), ("What is $2+3$", "5.0"), ("What is 2+4?", "6")
    )
    outcome = remove_exact(table)
    assert gone(outcome) == {2: "same", 3: "same"}
    assert outcome.removed.partners.tolist() == ["test-000001", "test-000001"]
    assert outcome.kept.numbers.tolist() == [0, 1, 4]


def test_exact_says_where_the_answers_contradict(rows) -> None:
    outcome = remove_exact(rows(("What is 2+3?", "5"), ("What is 2+3?", "6"), ("What is 2+3?", "5")))
    assert gone(outcome) == {1: "same_other_answer", 2: "same"}
    assert outcome.notes == {"other_answers": 1}


@pytest.mark.parametrize("step", [remove_exact, lambda table: remove_fuzzy(table, Options(threads=1))], ids=["exact", "fuzzy"])
def test_exempt_rows_stay_and_take_their_copies_with_them(step) -> None:
    own, other = (table_of([(LONG.format(48), "72")] * 2, name, exempt=name == "own") for name in ("own", "open"))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, COLUMNS) as writer:
        joined = pa.Table.from_batches([own.get_batch(0), other.get_batch(0)]).combine_chunks()
        writer.write_batch(joined.to_batches()[0])
    outcome = step(Rows(pa.ipc.open_file(pa.BufferReader(sink.getvalue()))))
    assert outcome.kept.numbers.tolist() == [0, 1]
    assert set(outcome.removed.partners) == {"own-000001"}


def test_fuzzy_removes_a_changed_word_and_names_the_kept_row(rows, options) -> None:
    first = LONG.format(48)
    outcome = remove_fuzzy(
        rows((first, "72"), ("A wholly different question about 3 trains?", "3"), (first.replace("friends", "pals"), "72")),
        options,
    )
    assert gone(outcome) == {2: "near"}
    assert outcome.removed.partners.tolist() == ["test-000001"]
    # 45 tokens, 43 shingles of 3, one of them twice; a word is in 3 of them.
    assert outcome.removed.scores[0] == pytest.approx(39 / 45, abs=1e-4)


def test_fuzzy_leaves_another_question_of_the_same_form(rows, options) -> None:
    table = rows((LONG.format(48), "72"), (LONG.format(50), "75"))
    outcome = remove_fuzzy(table, options)
    assert gone(outcome) == {}
    assert outcome.notes["near_but_two_questions"] == 1
    assert gone(remove_fuzzy(table, Options(threads=1, texts_alone=True))) == {1: "near"}


@pytest.mark.parametrize(
    ("answer", "other", "same_numbers", "near"),
    [
        ("72", "72.0", False, True),
        ("72", "75", True, False),
        (r"\frac{1}{2}", "0.5", False, True),
        ("26", r"48+9\sqrt{3}", True, False),
        ("yes", "no", False, False),
        ("yes", "no", True, True),
        ("72 clips", "72", True, True),
    ],
)
def test_near_pairs_are_two_questions_where_the_answers_say_so(rows, options, answer, other, same_numbers, near) -> None:
    second = LONG.format(48).replace("friends", "pals") if same_numbers else LONG.format(50)
    assert bool(gone(remove_fuzzy(rows((LONG.format(48), answer), (second, other)), options))) is near


def test_fuzzy_does_not_remove_along_a_chain(rows, options) -> None:
    words = [f"word{chr(97 + n)}{chr(97 + n % 7)}" for n in range(26)]
    texts = [" ".join(words[shift:] + [f"new{chr(97 + n)}" for n in range(shift)]) for shift in (0, 2, 4)]
    near = {shift: len(set(range(24)) & set(range(shift, 24))) for shift in (2, 4)}
    assert near[2] / (48 - near[2]) > 0.8 > near[4] / (48 - near[4])
    assert gone(remove_fuzzy(rows(*((text, "1") for text in texts)), options)) == {1: "near"}


def brute_force(sets: list[set[int]], threshold: float) -> dict[int, int]:
    """Greedy over all pairs, with no sketch: what the step must find."""
    kept, removed = [], {}
    for row, own in enumerate(sets):
        near = [(len(own & sets[other]) / max(1, len(own | sets[other])), -other) for other in kept]
        best = max(near, default=(0.0, 0))
        if best[0] >= threshold:
            removed[row] = -best[1]
        else:
            kept.append(row)
    return removed


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=0, max_size=20), min_size=2, max_size=12), st.sampled_from([0.5, 0.8, 0.95])
)
def test_fuzzy_is_brute_force_where_every_pair_is_a_candidate(found: list[list[int]], threshold: float) -> None:
    sets = [sorted(set(each)) for each in found]
    shingles = np.array([shingle for each in sets for shingle in each], np.uint32)
    starts = np.concatenate(([0], np.cumsum([len(each) for each in sets]))).astype(np.int64)
    everyone = np.zeros((len(sets), 1), np.uint32)
    buckets = fuzzy._buckets(everyone)
    nothing = np.zeros(len(sets), np.uint64)
    partner, score, _ = fuzzy._greedy(
        shingles, starts, *buckets, nothing.astype(bool), np.zeros(len(sets)), nothing, nothing, nothing, threshold, fuzzy.CROWD
    )
    expected = brute_force([set(each) for each in sets], threshold)
    assert {row for row in range(len(sets)) if partner[row] >= 0} == set(expected)
    for row, other in expected.items():
        left, right = set(sets[row]), set(sets[other])
        assert score[row] == len(left & right) / len(left | right)


def test_lsh_finds_what_its_formula_says() -> None:
    """Pairs at J = 0.8 share a band with probability 1 − (1 − 0.8^5)^25 = 0.99995; at 0.5 with 0.548; unrelated ones almost
    never."""
    chance, options, pairs = np.random.default_rng(3), Options(threads=1), 2000
    for common, expected, slack in ((40, 0.99995, 0.002), (30, 0.548, 0.04), (0, 0.0, 0.002)):
        sets = chance.integers(0, 2**32, (pairs, 2, 45), dtype=np.uint32)
        sets[:, 1, :common] = sets[:, 0, :common]
        flat = np.sort(sets.reshape(-1, 45), axis=1)
        size = options.bands * options.band_rows
        numbers = np.random.default_rng(0)
        factors, terms = (numbers.integers(0, 2**32, size, dtype=np.uint32) for _ in range(2))
        made = fuzzy.signatures_of(flat.reshape(-1), np.arange(0, flat.size + 1, 45), factors | np.uint32(1), terms)
        equal = (made[0::2] == made[1::2]).reshape(pairs, options.bands, options.band_rows).all(2).any(1)
        assert equal.mean() == pytest.approx(expected, abs=slack)


def test_sketch_bands_agree_for_equal_keys_only() -> None:
    _, _, bands = fuzzy.sketch(
        pl.Series(["how many apples are there in all", "how many apples are there in all", "9 x 9 = ?"]), Options()
    )
    assert (bands[0] == bands[1]).all()
    assert not (bands[0] == bands[2]).any()


FILLER = [
    f"Compute the {word} of {number} and {number + 1} over the rational integers."
    for number, word in enumerate(("sum", "product", "ratio") * 30)
]


def test_semantic_removes_a_rephrased_question(rows, options) -> None:
    pair = (
        "What is the least positive integer with exactly 10 positive factors?",
        "What is the smallest positive integer with exactly 10 positive factors?",
    )
    table = rows(*((text, str(number)) for number, text in enumerate(FILLER)), (pair[0], "48"), (pair[1], "48"))
    outcome = remove_semantic(table, Options(threads=1, dimensions=16))
    assert gone(outcome) == {len(FILLER) + 1: "meaning"}
    assert outcome.removed.partners.tolist() == [f"test-{len(FILLER) + 1:06d}"]


def test_semantic_needs_the_same_numbers_and_answers(rows) -> None:
    texts = [
        ("Find the sum of 3 and 5 and 9 here.", "17"),
        ("Find the sum of 3 and 5 and 8 here.", "17"),
        ("Find the sum of 3 and 5 and 9 there.", "18"),
    ]
    wordless = [
        ("Which fruit stands first in the row of fruit?", "apple"),
        ("Which fruit stands first in a row of fruit?", "pear"),
    ]
    table = rows(*texts, *wordless, *((text, "1") for text in FILLER))
    options = Options(threads=1, semantic_threshold=0.5)
    assert not set(gone(remove_semantic(table, options))) & set(range(5))
    plain = gone(remove_semantic(table, Options(threads=1, semantic_threshold=0.5, texts_alone=True)))
    assert {1, 2, 4} <= set(plain)


def test_semantic_of_nothing(rows, options) -> None:
    assert gone(remove_semantic(rows("one"), options)) == {}
    assert gone(remove_semantic(rows(*(f"number {n} alone" for n in range(5))), options)) == {}


def test_two_nearest_centres_come_nearest_first() -> None:
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    nearest = semantic.assign(vectors, Options(threads=1))
    means = np.array(
        [
            vectors[nearest[:, 0] == cluster].mean(0) if (nearest[:, 0] == cluster).any() else np.full(8, np.inf)
            for cluster in range(20)
        ]
    )
    assert nearest.shape == (400, 2)
    assert (nearest[:, 0] != nearest[:, 1]).all()
    distance = np.linalg.norm(vectors[:, None] - means[None], axis=2)
    rank = np.argsort(np.argsort(distance, axis=1), axis=1)
    assert np.take_along_axis(rank, nearest[:, :1].astype(int), axis=1).mean() < 1.5


def test_near_pairs_inside_a_cluster_are_greedy_over_blocks(monkeypatch) -> None:
    """Against brute force, with blocks of 4 so that pairs across blocks count too."""
    monkeypatch.setattr(semantic, "BLOCK", 4)
    chance = np.random.default_rng(1)
    vectors = chance.normal(size=(60, 3)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    same = np.zeros(60, np.uint64)
    judges = semantic.Judges(semantic.Answers(np.zeros(60), same, same, same), same, np.zeros(60, bool))
    late, early, _, _ = semantic.near_pairs(vectors, np.arange(60), judges, 0.9)
    removed = set(semantic._greedily_removed(late, early).tolist())
    expected: set[int] = set()
    for row in range(60):
        if any(vectors[row] @ vectors[other] >= 0.9 for other in range(row) if other not in expected):
            expected.add(row)
    assert removed == expected


def test_embedding_sees_words_not_their_place() -> None:
    texts = ["the red apple and the green pear", "the green pear and the red apple", "seven trains leave for London", *FILLER]
    table = Rows(table_of([(text, "1") for text in texts]))
    vectors = embed.embedder(table, Options(threads=1, dimensions=16))(table.frame("key", "question"))
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.95 > 0.6 > vectors[0] @ vectors[2]


def test_a_folder_that_is_no_model(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    with pytest.raises(InputError, match="--embedder"):
        embed.embedder(None, Options(embedder=str(tmp_path)))


def test_a_model2vec_folder(tmp_path, rows) -> None:
    model2vec = pytest.importorskip("model2vec", reason="model2vec, an optional embedder, is not installed")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: number for number, word in enumerate(["[UNK]", "apple", "pear", "train"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    model2vec.StaticModel(np.eye(4, dtype=np.float32), tokenizer).save_pretrained(tmp_path)
    vectors = embed.embedder(None, Options(embedder=str(tmp_path)))(
        rows("apple apple", "apple", "train").frame("key", "question")
    )
    assert vectors[0] @ vectors[1] == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[2] == pytest.approx(0, abs=1e-5)
