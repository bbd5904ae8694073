"""The committed table of verdicts that differ from the library's: none without a reason, and the verifier still holds to it."""

import json
from pathlib import Path

from benchmarks.verifier import explain
from rollout.reward.rule import RuleVerifier
from rollout.types import Prompt

TABLE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "verifier_disagreements.jsonl"


def rows():
    return [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def test_each_difference_has_its_reason():
    assert rows()
    for row in rows():
        assert row["library"] != row["ours"]
        assert (row["class"], row["why"]) == explain(row["gold"].strip(), row["prediction"].strip(), row["ours"])
        assert row["why"]


def test_a_difference_that_no_class_describes_is_named():
    assert explain("20", "2000", True) == ("unexplained", "")


def test_the_verifier_holds_to_its_table():
    with RuleVerifier("math-verify", workers=2, timeout_seconds=60.0) as verifier:
        verdicts = verifier.verify([(Prompt("p", "q", row["gold"]), row["prediction"]) for row in rows()])
    assert [verdict.right for verdict in verdicts] == [row["ours"] for row in rows()]
