"""Texts → unit vectors, for the semantic step.

- The embedded default needs no model: character 3- and 4-grams of the key, hashed to 2^16 columns, weighted by IDF, projected
  by a truncated SVD (latent semantic analysis, Deerwester et al. 1990). It sees words and their company, in any language; it
  does not see a paraphrase without a word in common.
- A model2vec or sentence-transformers folder given with --embedder sees those too.

Everything is fitted on an even sample, and each batch is embedded alone with one BLAS thread: the same vectors on any number of
threads. Hashing is linear, so a row is never held in more than its n-grams.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD

from curation import normalise
from curation.errors import InputError
from curation.options import Options
from curation.store import Rows

SAMPLE = 30_000
"""Rows that IDF and SVD are fitted on."""
_COLUMNS = 1 << 16
_SIZES = (3, 4)

Embed = Callable[[pl.DataFrame], np.ndarray]
"""A frame with the columns `key` and `question` → float32[n, d], each row of length 1, or 0 for a text without content."""


def embedder(rows: Rows, options: Options) -> Embed:
    """The embedder that the options name, fitted on these rows where it must be."""
    return _model(Path(options.embedder)) if options.embedder else _fit(rows, options)


def sample_numbers(rows: Rows, size: int) -> np.ndarray:
    """At most `size` of the rows' numbers, evenly spread."""
    step = max(1, -(-len(rows) // size))
    return rows.numbers[::step]


def _fit(rows: Rows, options: Options) -> Embed:
    sample = rows.at(sample_numbers(rows, SAMPLE)).frame("key")["key"]
    grams = [_ngrams(sample, size) for size in _SIZES]
    document_frequency = sum(np.bincount(_distinct(part), minlength=_COLUMNS) for part in grams)
    idf = np.log((1.0 + len(sample)) / (1.0 + document_frequency)).astype(np.float32) + np.float32(1)
    size = min(options.dimensions, len(sample) - 1)
    if size < 2:
        return lambda frame: np.zeros((len(frame), 1), np.float32)
    svd = TruncatedSVD(size, algorithm="randomized", n_iter=4, random_state=options.seed)
    svd.fit(sum(grams) @ sp.diags_array(idf, format="csr"))
    basis = np.ascontiguousarray(svd.components_.T * idf[:, None], np.float32)
    return lambda frame: _unit(sum(_ngrams(frame["key"], size) @ basis for size in _SIZES))


def _distinct(grams: sp.csr_array) -> np.ndarray:
    """The columns of each row, each once a row."""
    summed = grams.copy()
    summed.sum_duplicates()
    return summed.indices


def _ngrams(keys: pl.Series, size: int) -> sp.csr_array:
    """float32[n, 2^16]: a 1 for each n-gram of each key in its hashed column. Repeats stand side by side: a product sums them."""
    codes, starts = normalise.code_points(keys)
    ends = np.repeat(starts[1:], np.diff(starts))
    combined = np.full(len(codes), size, np.uint64)
    for offset in range(min(size, len(codes))):
        combined[: len(codes) - offset] = normalise.mix(combined[: len(codes) - offset] + codes[offset:])
    whole = np.arange(len(codes)) + size <= ends
    columns = (combined[whole] >> np.uint64(48)).astype(np.int32)
    before = np.concatenate(([0], np.cumsum(whole)))
    return sp.csr_array((np.ones(len(columns), np.float32), columns, before[starts]), (len(keys), _COLUMNS))


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def _model(folder: Path) -> Embed:
    """model2vec where its config says so, else sentence-transformers. Raises InputError for a missing package or unreadable
    folder."""
    static = _is_model2vec(folder)
    package, distribution = ("model2vec", "model2vec") if static else ("sentence_transformers", "sentence-transformers")
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--embedder: {folder} needs the package {distribution}; pip install {distribution}")
    try:
        if static:
            from model2vec import StaticModel

            model = StaticModel.from_pretrained(folder)
        else:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(str(folder))
    except Exception as error:  # whatever the packages raise for a folder that is no model
        why = " ".join(str(error).split())[:120]
        raise InputError(f"--embedder: {folder} is no readable {distribution} model ({why}); name its folder") from None
    return lambda frame: _unit(np.asarray(model.encode(frame["question"].to_list(), show_progress_bar=False), np.float32))


def _is_model2vec(folder: Path) -> bool:
    """Its config says model2vec, or its only module is a table of word vectors."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        modules = folder / "modules.json"
        types = (
            [str(module.get("type")) for module in json.loads(modules.read_text(encoding="utf-8"))] if modules.exists() else []
        )
    except (OSError, ValueError, AttributeError):
        return False
    return config.get("model_type") == "model2vec" or (len(types) > 0 and types[0].endswith("StaticEmbedding"))
