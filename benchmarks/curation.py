"""Curation, measured: everything in the real data at once; from 10 thousand to a million rows; the fuzzy step beside datasketch.

    python -m benchmarks.curation --data ../shared/data                        # real, fuzzy, and 10K, 30K, 100K rows
    python -m benchmarks.curation --data ../shared/data --only scale --sizes 1000000

The rows of the scale part are variants of the real questions, made into a temporary folder: full-width and respaced copies
(exact duplicates), copies with a few words changed (near duplicates), versions with other numbers and another answer (new
questions), and some choice, proof, answerless and benchmark rows. Each size is curated by its own process, whose memory is
watched together with that of its verification workers.

Sizes that were measured before stay in the result file, each with its own machine and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

from curation import fields, normalise, readers
from curation.ingest import table_of
from curation.options import Options, Source
from curation.pipeline import curate
from curation.progress import Progress
from curation.steps.fuzzy import remove_fuzzy, signatures_of
from curation.store import Rows
from trainer.environment import provenance, version_of

RESULT = Path(__file__).parent / "results" / "curation.json"
RAW = (
    "gsm8k/train.jsonl",
    "math_train_rllm/math.json",
    "one_shot_rlvr/dsr_sub.parquet",
    "tal_scq5k/ch_single_choice_train_3K.jsonl",
    "agieval/gaokao-mathqa.jsonl",
    "agieval/gaokao-mathcloze.jsonl",
    "gaokao_bench/2010-2022_Math_II_Fill-in-the-Blank.json",
    "gaokao_bench/2010-2022_Math_II_MCQs.json",
    "gaokao_bench/2010-2022_Math_I_Fill-in-the-Blank.json",
    "gaokao_bench/2010-2022_Math_I_MCQs.json",
    "traces_math_cot_100/math_cot_100.jsonl",
    "eval_competition/math500.jsonl",
    "eval_competition/amc23.jsonl",
    "eval_competition/aime24.parquet",
)
BENCHMARKS = tuple(name for name in RAW if name.startswith(("eval_competition/", "gaokao_bench/")))
BASES = RAW[:4]
LIBRARIES = ("polars", "pyarrow", "numba", "scikit-learn", "scipy", "opencc", "datasketch", "rensa")
NAMES = ("Ada", "Bao", "Carl", "Dina", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jo", "Kai", "Lena", "Max", "Nora", "Omar", "Pia")
CAPITAL = re.compile(
    r"\b(?:Natalia|James|John|Mary|Tom|Sam|Lisa|Anna|Bob|Mark|Janet|Jack|Emily|Sarah|Mike|Tim|Joe|Jane|Peter|Kate)\b"
)


def sources(data: Path, names: tuple[str, ...]) -> list[Source]:
    return [Source(data / name) for name in names]


def versions() -> dict[str, str]:
    return provenance() | {name: version_of(name) for name in LIBRARIES}


# --- real data


def measure_real(data: Path) -> dict[str, Any]:
    """Everything at once, twice, on one thread and on two: the outputs must be the same to the byte."""
    with tempfile.TemporaryDirectory() as folder:
        outs, seconds, made = [], [], None
        for threads in (2, 1):
            out = Path(folder) / f"{threads}" / "prompts.parquet"
            started = time.perf_counter()
            made = curate(sources(data, RAW), sources(data, BENCHMARKS), Options(threads=threads), out, show=Progress())
            seconds.append(time.perf_counter() - started)
            outs.append({path.name: path.read_bytes() for path in sorted(out.parent.iterdir())})
        removed = pl.read_parquet(Path(folder) / "1" / "prompts.removed.parquet")
    pairs = removed.with_columns(of=pl.col("partner").str.replace(r"-\d+$", "")).group_by("step", "source", "of", "reason").len()
    overlaps = pairs.filter(pl.col("of") != "").sort("len", "step", "source", "of", "reason", descending=[True] + 4 * [False])
    return {
        "seconds_two_threads": round(seconds[0], 1),
        "same_bytes_on_one_and_two_threads": outs[0] == outs[1],
        "overlaps": [dict(zip(("step", "source", "of", "reason", "rows"), row, strict=True)) for row in overlaps.iter_rows()],
        **{name: made.data[name] for name in ("rows_read", "rows_quarantined", "rows_kept", "sources", "quarantine", "flags")},
        "steps": [
            {name: step[name] for name in ("name", "in", "out", "reasons", "by_source", "notes")} for step in made.data["steps"]
        ],
    }


# --- made rows


def bases(data: Path) -> list[tuple[str, str]]:
    """(question, answer) of the real questions that the made rows are variants of."""
    found = []
    for source in sources(data, BASES):
        chosen = fields.detect(readers.first_row(source.path), str(source.path))
        for _, raw in readers.rows(source.path):
            row = chosen.read(raw)
            if row.answer and len(row.question) > 30:
                found.append((row.question, row.answer))
    return found


def respaced(text: str, chance: random.Random) -> str:
    """The same question, typed by somebody else: a duplicate after normalisation."""
    if chance.random() < 0.5:
        text = text.translate({code: code + 0xFEE0 for code in range(ord("0"), ord("9") + 1)})
    text = text.replace("\\frac", "\\dfrac") if chance.random() < 0.5 else text.replace(" ", "  ")
    return text + chance.choice(("", " ", "\n", ".", "？"))


def renumbered(text: str, chance: random.Random) -> str:
    """Another question of the same form."""
    text = re.sub(r"(?<![\\^_{\d])\d+", lambda match: str(chance.randint(2, 10 ** min(len(match[0]) + 1, 4))), text)
    return CAPITAL.sub(lambda _: chance.choice(NAMES), text)


def reworded(text: str, chance: random.Random, words: int) -> str:
    """`words` words (or Chinese characters) other than they were; numbers and LaTeX stay."""
    places = [match.span() for match in re.finditer(r"(?<![\\\w])[a-z]{3,}(?![\w}])|[\u4e00-\u9fff]", text)]
    for begin, end in sorted(chance.sample(places, min(words, len(places))), reverse=True):
        new = (
            chance.choice("甲乙丙丁戊己庚辛") if end - begin == 1 else "".join(chance.choices("abcdefghijklmnop", k=end - begin))
        )
        text = text[:begin] + new + text[end:]
    return text


def variants(real: list[tuple[str, str]], tests: list[str], count: int, seed: int) -> Iterator[dict[str, str | None]]:
    chance = random.Random(seed)
    for _ in range(count):
        question, answer = chance.choice(real)
        kind = chance.random()
        if kind < 0.20:
            question = respaced(question, chance)
        elif kind < 0.40:
            question = reworded(question, chance, 1 + chance.randrange(2))
        elif kind < 0.95:
            question, answer = renumbered(question, chance), str(chance.randint(0, 10**6))
        elif kind < 0.96:
            answer = None
        elif kind < 0.97:
            question = f"{question}\nA. 1\nB. 2\nC. 3\nD. 4"
        elif kind < 0.98:
            question = f"Prove that {question}"
        else:
            question = chance.choice(tests)
        yield {"question": question, "answer": answer}


def measure_size(data: Path, rows: int, threads: int) -> dict[str, Any]:
    """Curate `rows` made rows in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.jsonl"
        tests = [chosen for chosen, _ in _questions(data / "eval_competition/math500.jsonl")]
        with path.open("w", encoding="utf-8") as file:
            for row in variants(bases(data), tests, rows, seed=rows):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        context = multiprocessing.get_context("spawn")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_curate_made, args=(data, path, threads, send))
        process.start()
        send.close()
        peak = PeakMemory(process.pid)
        found = receive.recv()
        process.join()
        return {
            "rows": rows,
            "megabytes": round(path.stat().st_size / 2**20, 1),
            "peak_gib": max(round(peak.stop(), 2), found["own_peak_gib"]),
            **found,
        }


class PeakMemory:
    """The largest sum of the resident memory of a process and all its descendants, looked at ten times a second. What they share
    (libraries, mapped files) is counted for each, so the sum is too high rather than too low."""

    def __init__(self, pid: int) -> None:
        self._root, self._peak, self._over = psutil.Process(pid), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            with contextlib.suppress(psutil.Error):
                self._peak = max(
                    self._peak, sum(_resident(process) for process in (self._root, *self._root.children(recursive=True)))
                )

    def stop(self) -> float:
        """GiB."""
        self._over.set()
        self._thread.join()
        return self._peak / 2**30


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # it ended in between
        return 0


def _questions(path: Path) -> list[tuple[str, str]]:
    chosen = fields.detect(readers.first_row(path), str(path))
    return [(row.question, row.answer or "") for row in (chosen.read(raw) for _, raw in readers.rows(path))]


def _curate_made(data: Path, path: Path, threads: int, send: Any) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    made = curate(
        [Source(path)],
        sources(data, BENCHMARKS[-3:]),
        Options(threads=threads),
        path.with_name("prompts.parquet"),
        show=Progress(),
    )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    send.send(
        {
            "threads": threads,
            "seconds": round(time.perf_counter() - started, 1),
            "own_cpu_seconds": round(time.process_time() - cpu, 1),
            "own_peak_gib": round(own, 2),
            "kept": made.data["rows_kept"],
            "step_seconds": {name: round(taken, 1) for name, taken in made.seconds.items()},
            "removed": {step["name"]: step["removed"] for step in made.data["steps"]},
            "notes": {step["name"]: step["notes"] for step in made.data["steps"]},
        }
    )


# --- the fuzzy step beside datasketch


def planted(real: list[tuple[str, str]], seed: int) -> tuple[list[tuple[str, str]], list[int]]:
    """(rows; for each row its original's place, -1 for an original). A third of the rows are near duplicates by construction."""
    chance = random.Random(seed)
    rows, origin = [], []
    for question, answer in real:
        place = len(rows)
        rows.append((question, answer))
        origin.append(-1)
        if chance.random() < 0.5:
            rows.append((reworded(question, chance, 1 + chance.randrange(3)), answer))
            origin.append(place)
    return rows, origin


def shingle_sets(keys: pl.Series, options: Options) -> list[set[int]]:
    grams, starts = normalise.ngrams(normalise.bare(normalise.tokens(keys)), options.shingle)
    return [set(grams[begin:end].tolist()) for begin, end in itertools.pairwise(starts.tolist())]


def jaccard(left: set[int], right: set[int]) -> float:
    return len(left & right) / max(1, len(left | right))


def with_datasketch(sets: list[set[int]], options: Options) -> dict[int, int]:
    """The straightforward way: one MinHash a row, an LSH index of the rows kept, candidates verified by their true similarity.
    Row → the kept row that removes it."""
    from datasketch import MinHash, MinHashLSH

    size = options.bands * options.band_rows
    lsh = MinHashLSH(num_perm=size, params=(options.bands, options.band_rows))
    removed = {}
    for row, shingles in enumerate(sets):
        sketch = MinHash(num_perm=size, seed=1)
        sketch.update_batch([shingle.to_bytes(4, "little") for shingle in shingles])
        near = [other for other in lsh.query(sketch) if jaccard(shingles, sets[other]) >= options.fuzzy_threshold]
        if near:
            removed[row] = min(near)
        else:
            lsh.insert(row, sketch)
    return removed


def measure_fuzzy(data: Path) -> dict[str, Any]:
    """Both on the same rows, texts alone, in one process and on one thread each; recall and false removals by true
    similarities."""
    options = Options(threads=1, texts_alone=True)
    rows_made, origin = planted(bases(data), seed=1)
    rows = Rows(table_of(rows_made))
    keys = rows.frame("key")["key"]
    sets = shingle_sets(keys, options)
    remove_fuzzy(rows.at(np.arange(64)), options)  # compiles
    started = time.perf_counter()
    ours = remove_fuzzy(rows, options)
    our_seconds = time.perf_counter() - started
    started = time.perf_counter()
    # From the keys on, as ours does: the shingles are a part of the work.
    theirs = with_datasketch(shingle_sets(keys, options), options)
    their_seconds = time.perf_counter() - started
    gone = set(ours.removed.numbers.tolist())
    near = [row for row, first in enumerate(origin) if first >= 0 and jaccard(sets[row], sets[first]) >= options.fuzzy_threshold]
    left = [row for row in near if row not in gone]
    names = rows.frame("id")["id"].to_list()
    place = {name: number for number, name in enumerate(names)}
    partners = zip(ours.removed.numbers.tolist(), ours.removed.partners.tolist(), strict=True)
    false = sum(jaccard(sets[row], sets[place[partner]]) < options.fuzzy_threshold for row, partner in partners)
    plain = sum(origin[row] < 0 and not _has_near(row, sets, origin, options) for row in gone)
    return {
        "rows": len(rows),
        "planted_at_or_above_threshold": len(near),
        "removed": len(gone),
        "removed_by_datasketch": len(theirs),
        "seconds": round(our_seconds, 3),
        "datasketch_seconds": round(their_seconds, 3),
        "times_faster": round(their_seconds / our_seconds, 1),
        # Where the original itself went, as another's duplicate, its near duplicate may stay: the pair is no longer in the
        # output.
        "recall": round(1 - sum(origin[row] not in gone for row in left) / len(near), 5),
        "planted_rows_removed": round(1 - len(left) / len(near), 5),
        "planted_rows_removed_by_datasketch": round(sum(row in theirs for row in near) / len(near), 5),
        "false_removals": false,
        "false_removal_rate": false / len(rows),
        "removed_originals_without_an_earlier_near_row": plain,
        "candidates_compared": ours.notes["compared"],
        "signatures": measure_signatures(keys, options),
        "compiled": "before the clock starts",
    }


def measure_signatures(keys: pl.Series, options: Options) -> dict[str, float]:
    """Seconds for all MinHash signatures, from the shingles to a NumPy array; rensa's (128 entries) where it is installed."""
    shingles, starts = normalise.ngrams(normalise.bare(normalise.tokens(keys)), options.shingle)
    factors = np.arange(1, 2 * options.bands * options.band_rows, 2, dtype=np.uint32)
    started = time.perf_counter()
    signatures_of(shingles, starts, factors, factors)
    seconds = {"ours": round(time.perf_counter() - started, 4)}
    with contextlib.suppress(ImportError):
        from rensa import RMinHash

        hashes = normalise.mix(shingles.astype(np.uint64))
        started = time.perf_counter()
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, starts, 128, 0)
        seconds["rensa"] = round(time.perf_counter() - started, 4)
        np.array(matrix.to_rows(), np.uint32)
        seconds["rensa_to_numpy"] = round(time.perf_counter() - started, 4)
    return seconds


def _has_near(row: int, sets: list[set[int]], origin: list[int], options: Options) -> bool:
    """By brute force: is any earlier row near?"""
    return any(jaccard(sets[row], sets[other]) >= options.fuzzy_threshold for other in range(row) if origin[other] != row)


# --- the picture


def plot(sizes: dict[str, Any], path: Path) -> None:
    """Seconds by step and peak memory against rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = sorted(sizes.values(), key=lambda point: point["rows"])
    rows = [point["rows"] for point in points]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    left.plot(rows, [point["seconds"] for point in points], "o-", linewidth=2.5, color="black", label="all")
    for step in points[-1]["step_seconds"]:
        seconds = [point["step_seconds"].get(step, 0) or math.nan for point in points]  # 0.0 has no place on this scale
        left.plot(rows, seconds, "o-", markersize=3, label=step)
    left.plot(rows, [points[-1]["seconds"] * count / rows[-1] for count in rows], ":", color="grey", label="linear")
    left.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds", title="time (steps below 0.05 s are left out)")
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    right.plot(rows, [point["peak_gib"] for point in points], "o-", label="with workers")
    right.plot(rows, [point["own_peak_gib"] for point in points], "o--", markersize=3, label="alone")  # often the same
    right.set(xscale="log", xlabel="rows", ylabel="GiB", title="peak memory", ylim=(0, None))
    right.legend(fontsize=8)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=130, metadata={"Date": None} if suffix == ".svg" else None)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curation")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", default="real,fuzzy,scale")
    parser.add_argument("--sizes", default="10000,30000,100000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    wanted = given.only.split(",")
    if "real" in wanted:
        result["real"] = {"machine": versions(), **measure_real(given.data)}
    if "fuzzy" in wanted:
        result["fuzzy"] = {"machine": versions(), **measure_fuzzy(given.data)}
    if "scale" in wanted:
        for size in map(int, given.sizes.split(",")):
            result.setdefault("scale", {})[str(size)] = {
                "machine": versions(),
                **measure_size(given.data, size, given.threads),
            }
        plot(result["scale"], given.out)
    given.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    for name in wanted:
        shown = (
            result[name]
            if name != "real"
            else {key: result[name][key] for key in ("rows_read", "rows_kept", "seconds_two_threads")}
        )
        print(name, json.dumps(shown, ensure_ascii=False)[:1500])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
