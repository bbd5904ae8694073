"""The reward, measured: what the repetition filter catches, how many outputs mix languages, and how fast a batch is judged.

    python -m benchmarks.reward --data ../shared/data                 # all three, into benchmarks/results/reward.json
    python -m benchmarks.reward --only throughput --gate

- repetition: precision and recall over the outputs labelled by reading (tests/rollout/repetition_labels.csv), every text that
  zlib makes smaller than 0.12 of itself, and solutions by people (GSM8K, MATH-500, TAL-SCQ5K, GAOKAO-Bench), which nobody had in
  mind when the limits were chosen.
- languages: the share of mixed-language outputs among the 3,676 RL rollouts.
- throughput: 256 samples of 16,384 tokens, made of real outputs cut and joined, with real (gold, answer) pairs, filtered and
  verified from an empty cache; medians, beside the plain form of the filter. The workers' start is not in it.

--gate: exit code 1 where a limit does not hold (the issue's: every loop, under 1 % of the clean, under 3 s on two cores).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reward_traces import LOOP_RATIO, labels, parts, qwen_tokenizer, zlib_ratio
from rollout.cli import run
from rollout.environment import provenance, version_of
from rollout.reward.correctness import Correctness
from rollout.reward.format import Response
from rollout.reward.languages import measure_languages
from rollout.reward.pipeline import Reward
from rollout.reward.repetition import (
    RepetitionDetector,
    RepetitionLimits,
    counters_of,
    hide_counters,
    measure_repetition,
    words_in,
)
from rollout.reward.rule import RuleVerifier
from rollout.reward.tokens import PlainReader
from rollout.types import Prompt, Sample, Verdict

RESULT = Path(__file__).parent / "results" / "reward.json"
SAMPLES = 256
TOKENS = 16384
PREFILL = "<think>\n"
AT_MOST_SECONDS = 3.0
AT_MOST_CLEAN = 0.01


def measure_repetition_filter(data: Path, tokenizer: Any) -> dict[str, Any]:
    detector = RepetitionDetector(RepetitionLimits(), tokenizer.get_vocab())
    labelled = labels()
    counts: Counter[tuple[str, bool]] = Counter()
    loops = missed = unlabelled = total = 0
    for part in parts(data):
        caught = detector(encode(tokenizer, part.text)) is not None
        total += 1
        label = labelled.get(part.key)
        counts[label or "unlabelled", caught] += 1
        unlabelled += caught and label is None
        if zlib_ratio(part.text) < LOOP_RATIO:
            loops += 1
            missed += not caught
    right, wrong, lost = counts["loop", True], counts["clean", True], counts["loop", False]
    people = Counter(detector(encode(tokenizer, text)) is not None for text in solutions_by_people(data))
    return {
        "parts": total,
        "labelled": {name: counts[name, True] + counts[name, False] for name in ("loop", "clean", "borderline")},
        "precision": right / max(1, right + wrong),
        "recall": right / max(1, right + lost),
        "clean_caught": wrong / max(1, wrong + counts["clean", False]),
        "borderline_caught": counts["borderline", True],
        "caught_without_label": unlabelled,
        f"loops_below_{LOOP_RATIO}": loops,
        "of_them_missed": missed,
        "solutions_by_people": people.total(),
        "of_them_caught": people[True],
        **measure_margins(data, tokenizer),
    }


def measure_margins(data: Path, tokenizer: Any) -> dict[str, Any]:
    """How near the labelled outputs come to the limits: the most among the clean ones, and each loop that repeats no stretch."""
    limits = RepetitionLimits()
    exact = RepetitionDetector(replace(limits, min_counting_tokens=2**31, max_ngram_share=1.0), tokenizer.get_vocab())
    counters = counters_of(tokenizer.get_vocab())
    labelled = labels()
    clean = {"counting_tokens": 0, "ngram_share": 0.0}
    loops = {}
    for part in parts(data):
        if labelled.get(part.key) not in ("clean", "loop"):
            continue
        ids = encode(tokenizer, part.text)
        hidden, _ = hide_counters(ids, counters)
        counting = measure_repetition(hidden, limits.ngram, min_count=limits.min_count)
        enough = counting.covered >= limits.min_covered * len(hidden)
        here = {
            "counting_tokens": words_in(hidden, counting) if enough else 0,
            "ngram_share": round(measure_repetition(ids, limits.ngram).ngram_share, 3),
        }
        if labelled[part.key] == "clean":
            clean = {name: max(clean[name], value) for name, value in here.items()}
        elif exact(ids) is None:
            loops[" ".join(part.key)] = here
    return {"most_among_the_clean": clean, "loops_without_an_exact_stretch": loops}


def solutions_by_people(data: Path) -> Iterator[str]:
    for line in (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["answer"]
    for line in (data / "eval_competition" / "math500.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["solution"]
    for line in (data / "tal_scq5k" / "ch_single_choice_train_3K.jsonl").read_text(encoding="utf-8").splitlines():
        yield " ".join(json.loads(line)["answer_analysis"])
    for file in sorted((data / "gaokao_bench").glob("*.json")):
        yield from (example["analysis"] for example in json.loads(file.read_text(encoding="utf-8"))["example"])


def measure_mixing(data: Path) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for part in parts(data):
        found.setdefault(part.source, []).append(measure_languages(part.text, part.question))
    rollouts = found["gspo-r1distill15b"]
    return {
        "rollouts": len(rollouts),
        "mixed": sum(each.mixed for each in rollouts),
        "mixed_share": sum(each.mixed for each in rollouts) / len(rollouts),
        "with_any_foreign_letter": sum(each.foreign_letters > 0 for each in rollouts) / len(rollouts),
        "rollouts_with_script": dict(Counter(script for each in rollouts for script in each.shares).most_common()),
        "mixed_elsewhere": {name: sum(each.mixed for each in some) for name, some in found.items() if some is not rollouts},
        "outputs_elsewhere": sum(len(some) for some in found.values()) - len(rollouts),
    }


def measure_throughput(data: Path, tokenizer: Any, workers: int, rounds: int) -> dict[str, Any]:
    batches = make_batches(data, tokenizer, rounds)
    first = batches[0]
    alone = Reward(Nothing(), tokenizer, prefill=PREFILL)
    single = Reward(Nothing(), tokenizer, prefill=PREFILL, threads=1)
    plain = Reward(Nothing(), tokenizer, prefill=PREFILL, reader=PlainReader(tokenizer), threads=1)
    with Correctness(RuleVerifier("math-verify", workers, 10.0)) as verifier:
        warm = [(prompt, Response("", f"{at}.5")) for at, (prompt, _) in enumerate(first[: 8 * workers])]
        verifier.verify(warm)  # the workers have started, and SymPy has loaded what it loads when it is first used
        reward = Reward(verifier, tokenizer, prefill=PREFILL)
        whole, verdicts = timed(lambda batch: reward.judge(batch), batches)
    filtering, _ = timed(lambda batch: alone.judge(batch), batches)
    before = time.process_time()
    filtering_single, fast = timed(lambda batch: single.judge(batch), batches)
    spent = (time.process_time() - before) / rounds
    filtering_plain, slow = timed(lambda batch: plain.judge(batch), batches[:1])
    return {
        "samples": len(first),
        "tokens": int(sum(len(sample.token_ids) for _, sample in first)),
        "workers": workers,
        "rounds": rounds,
        "seconds": statistics.median(whole),
        "seconds_of_rounds": whole,
        "filter_seconds": statistics.median(filtering),
        "filter_seconds_one_thread": statistics.median(filtering_single),
        "filter_cpu_seconds_one_thread": round(spent, 3),
        "plain_filter_seconds": filtering_plain[0],
        "filter_as_plain": [each.reason for each in fast[0]] == [each.reason for each in slow[0]],
        "verdicts": dict(Counter(verdict.reason for batch in verdicts for verdict in batch).most_common()),
    }


class Nothing:
    """A verifier that takes no time."""

    def verify(self, pairs: list[tuple[Prompt, Any]]) -> list[Any]:
        return [Verdict(True, "right")] * len(pairs)


def make_batches(data: Path, tokenizer: Any, count: int) -> list[list[tuple[Prompt, Sample]]]:
    """256 samples each, no (gold, answer) pair twice, each pair behind a thinking cut and joined from real outputs that are no
    loops."""
    chance = random.Random(1)
    texts = real_texts(data, tokenizer)
    thinkings = [join(texts, chance) for _ in range(SAMPLES)]
    lines = (data / "verifier_pairs" / "skythought_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    answers = sorted({(str(row["gold"]), str(row["pred"])) for row in map(json.loads, lines) if str(row["pred"]).strip()})
    chosen = chance.sample(answers, SAMPLES * count)
    batches: list[list[tuple[Prompt, Sample]]] = []
    for number, (gold, answer) in enumerate(chosen):
        if number % SAMPLES == 0:
            batches.append([])
        tail = encode(tokenizer, f"</think>\n<answer>{answer}</answer>{tokenizer.eos_token}")
        ids = np.concatenate([thinkings[number % SAMPLES][: TOKENS - len(tail)], tail])
        sample = Sample(ids, np.zeros(len(ids), np.float32), "stop", 0)
        batches[-1].append((Prompt(f"p{number}", "What is it?", gold), sample))
    return batches


def real_texts(data: Path, tokenizer: Any) -> list[list[np.ndarray]]:
    """The tokens of each question's outputs, without the loops and those with tags in them."""
    known = labels()
    texts: dict[str, list[np.ndarray]] = {}
    for part in parts(data):
        if known.get(part.key) != "loop" and not re.search(r"</?(?:think|answer)>", part.text):
            texts.setdefault(f"{part.source} {part.row.partition('.')[0]}", []).append(encode(tokenizer, part.text + "\n\n"))
    return list(texts.values())


def join(texts: list[list[np.ndarray]], chance: random.Random) -> np.ndarray:
    """At least TOKENS tokens, with one output of a question at most: eight solutions of one would be repetition indeed."""
    chosen: list[np.ndarray] = []
    for outputs in chance.sample(texts, len(texts)):
        chosen.append(chance.choice(outputs))
        if sum(map(len, chosen)) >= TOKENS:
            break
    return np.concatenate(chosen)


def timed(call: Callable[[Any], Any], inputs: list[Any]) -> tuple[list[float], list[Any]]:
    seconds, outcomes = [], []
    for each in inputs:
        start = time.perf_counter()
        outcomes.append(call(each))
        seconds.append(round(time.perf_counter() - start, 4))
    return seconds, outcomes


def encode(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)


def failures(result: dict[str, Any]) -> list[str]:
    """Which limits do not hold, of what was measured."""
    broken = []
    if repetition := result.get("repetition"):
        if repetition["of_them_missed"]:
            broken.append(f"{repetition['of_them_missed']} loops with a zlib ratio under {LOOP_RATIO} are not caught")
        people = repetition["of_them_caught"] / repetition["solutions_by_people"]
        for what, share in (("clean outputs", repetition["clean_caught"]), ("solutions by people", people)):
            if share >= AT_MOST_CLEAN:
                broken.append(f"{share:.2%} of the {what} are caught; under {AT_MOST_CLEAN:.0%} may be")
    if throughput := result.get("throughput"):
        if throughput["seconds"] >= AT_MOST_SECONDS:
            broken.append(f"a batch takes {throughput['seconds']:.2f} s; under {AT_MOST_SECONDS:g} s it should")
        if not throughput["filter_as_plain"]:
            broken.append("the filter's fast form and its plain one do not agree")
    return broken


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reward")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="repetition,languages,throughput")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = qwen_tokenizer(given.data, Path(folder))
    versions = provenance() | {name: version_of(name) for name in ("math-verify", "tokenizers", "numpy")}
    for name in given.only.split(","):
        if name == "repetition":
            measured[name] = measure_repetition_filter(given.data, tokenizer)
        elif name == "languages":
            measured[name] = measure_mixing(given.data)
        else:
            measured[name] = measure_throughput(given.data, tokenizer, given.workers, given.rounds)
    print(json.dumps(measured, ensure_ascii=False, indent=1))
    broken = failures(measured)
    for line in broken:
        print("gate:", line, file=sys.stderr)
    if given.gate:
        return 1 if broken else 0
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    kept |= {name: {"machine": versions, **values} for name, values in measured.items()}
    given.out.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
