"""`python -m curation RAW... --out prompts.parquet`"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from curation import report
from curation.errors import InputError
from curation.options import STEPS, Options, Source
from curation.pipeline import curate
from curation.progress import Progress

NUMBERS = {
    "ngram": "tokens of an n-gram in the decontamination",
    "overlap": "share of a benchmark question's n-grams that counts",
    "shingle": "tokens of a shingle",
    "fuzzy-threshold": "Jaccard similarity",
    "bands": "LSH bands",
    "band-rows": "entries of a band",
    "semantic-threshold": "cosine",
    "dimensions": "of the default embedding",
    "verify-seconds": "hard limit for one answer",
    "seed": "of hashes, samples and clusters",
    "threads": "speed only",
}
"""Options that are numbers → what they say in --help."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see python -m curation --help")


def parser() -> argparse.ArgumentParser:
    default = Options(threads=1)
    made = _Parser(
        prog="python -m curation", description="Raw questions in, clean prompts out, in the order of the Confucius3-Math paper."
    )
    made.add_argument(
        "raw",
        nargs="*",
        metavar="[NAME=]RAW",
        help="JSONL, JSON, Parquet or CSV; NAME is a field map (gsm8k, numinamath, …) or a label",
    )
    made.add_argument(
        "--out", required=True, type=Path, help="the .parquet file to write; report, quarantine and removed rows go beside it"
    )
    made.add_argument(
        "--proprietary", nargs="+", action="extend", default=[], metavar="[NAME=]RAW", help="cleaned of entry noise only"
    )
    made.add_argument(
        "--benchmark", nargs="+", action="extend", default=[], metavar="[NAME=]FILE", help="test sets that must not be trained on"
    )
    made.add_argument(
        "--map", default="", metavar="question=…,answer=…", help="columns (or paths: prompt.0.content) of files without a NAME"
    )
    made.add_argument("--work", type=Path, help="keep finished steps here (default: beside --out, until it is written)")
    made.add_argument("--skip", action="append", default=[], choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    made.add_argument(
        "--embedder",
        default="",
        metavar="FOLDER",
        help="model2vec or sentence-transformers model (default: hashed n-grams + SVD)",
    )
    for name, text in NUMBERS.items():
        value = getattr(default, name.replace("-", "_"))
        made.add_argument(
            f"--{name}", type=type(value), default=None, help=f"{text} (default: {value if name != 'threads' else 'all'})"
        )
    made.add_argument(
        "--texts-alone",
        action="store_true",
        help="near texts are one question whatever their numbers and answers, as in the paper",
    )
    made.add_argument("--solutions", action="store_true", help="carry reference solutions along")
    made.add_argument("--quiet", action="store_true", help="no progress, no table")
    return made


def main(arguments: list[str]) -> int:
    """Raises InputError for whatever a user can mend."""
    given = parser().parse_args(arguments)
    sources = [Source.parse(text) for text in given.raw] + [Source.parse(text, exempt=True) for text in given.proprietary]
    if not sources:
        raise InputError("no raw file is named; write: python -m curation RAW... --out prompts.parquet")
    if given.out.suffix != ".parquet":
        raise InputError(f"--out: {str(given.out)!r} must end in .parquet; name it so")
    options = _options(given)
    benchmarks = [Source.parse(text) for text in given.benchmark]
    if not benchmarks and "decontaminate" not in options.skip and not given.quiet:
        print("no --benchmark is named: nothing is checked against test sets", file=sys.stderr)
    show = Progress(quiet=given.quiet)
    try:
        made = curate(sources, benchmarks, options, given.out, given.work, show)
    finally:
        show.stop()
    if not given.quiet:
        for table in report.tables(made):
            Console().print(table)
        print(f"{made.data['rows_kept']:,} prompts in {given.out}; {given.out.with_name(given.out.stem + '.report.html')}")
    return 0


def _options(given: argparse.Namespace) -> Options:
    fields = {}
    for part in filter(None, given.map.split(",")):
        name, equals, column = part.partition("=")
        if not equals or not column.strip():
            raise InputError(f"--map: {part!r} is not FIELD=COLUMN; write --map question=COLUMN,answer=COLUMN")
        fields[name.strip()] = column.strip()
    named = [name.replace("-", "_") for name in NUMBERS]
    values = {name: getattr(given, name) for name in named if getattr(given, name) is not None}
    return Options(
        fields, tuple(given.skip), embedder=given.embedder, texts_alone=given.texts_alone, solutions=given.solutions, **values
    )
