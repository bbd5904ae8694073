"""The gate of the reward's benchmark: each limit can fail, and does where it should."""

import pytest

from benchmarks.reward import failures

GOOD = {
    "repetition": {"of_them_missed": 0, "clean_caught": 0.0099, "of_them_caught": 9, "solutions_by_people": 1000},
    "throughput": {"seconds": 2.99, "filter_as_plain": True},
}


def test_nothing_fails_that_was_not_measured_or_holds():
    assert failures({}) == []
    assert failures({"languages": {}}) == []
    assert failures(GOOD) == []


@pytest.mark.parametrize(
    ("part", "name", "value", "expected"),
    [
        ("repetition", "of_them_missed", 1, "1 loops with a zlib ratio under 0.12 are not caught"),
        ("repetition", "clean_caught", 0.01, "1.00% of the clean outputs"),
        ("repetition", "of_them_caught", 10, "1.00% of the solutions by people"),
        ("throughput", "seconds", 3.0, "a batch takes 3.00 s"),
        ("throughput", "filter_as_plain", False, "do not agree"),
    ],
)
def test_each_limit_can_fail(part, name, value, expected):
    (line,) = failures({part: {**GOOD[part], name: value}})
    assert expected in line
