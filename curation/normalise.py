"""When are two texts the same question? The key, its tokens, their hashes.

The KEY of a text is the text without what typing decides: Unicode form (NFKC: full-width and half-width), case, traditional or
simplified characters (OpenCC's table, character by character), LaTeX spacing and styling, spaces. `key(key(x)) == key(x)`.

TOKENS are cut from the key by character class: a run of letters, a run of digits, a LaTeX command, or one sign or one Chinese
character. So an English word and a Chinese character weigh the same, and "5 cm" and "5cm" are equal. Prose punctuation is no
token.

Everything works on whole columns: Polars for the key, NumPy on code points for tokens. No row becomes a Python object.

Hashes. A token's hash is the polynomial Σ c_i·P^i over its code points, modulo 2^64, mixed by splitmix64's finaliser (Steele,
Lea, Flood 2014, https://doi.org/10.1145/2714064.2660195); a sequence's is the same polynomial over its tokens' hashes.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np
import polars as pl

_SIGNS = {
    "²": "^2",
    "³": "^3",
    "×": r" \times ",
    "÷": r" \div ",
    "≤": r" \leq ",
    "≥": r" \geq ",
    "≦": r" \leq ",
    "≧": r" \geq ",
    "≠": r" \neq ",
    "π": r" \pi ",
    "°": r" ^\circ ",
    "−": "-",
    "–": "-",
    "—": "-",
    "·": r" \cdot ",
    "∠": r" \angle ",
    "△": r" \triangle ",
    "√": r" \sqrt ",
    "∞": r" \infty ",
    "∈": r" \in ",
    "∪": r" \cup ",
    "∩": r" \cap ",
    "±": r" \pm ",
    "⊥": r" \perp ",
    "∥": r" \parallel ",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
}
_STYLE = (
    r"\\\\|\\(?:left|right|displaystyle|textstyle|limits|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|mbox|rm|bf|it"
    r"|uline|underline|qquad|quad|big|bigg|bigl|bigr|biggl|biggr)\b|\\[,;:!()\[\]]|\\\s|\\?[$~]"
)
"""Taken out, each for a space. The double backslash comes first, so that no half of it is left to pair with what follows."""
_BLANK = r"\\?(?:[({]\s*)+(?:[)}]\s*)+"
"""A place to fill in, or what styling leaves behind. Runs of brackets as a whole, so that taking one pair out never makes
another."""
_ALIKE = (
    (r"\\[dtc]frac\b", r"\frac"),
    (r"\\(?:leqslant|le)\b", r"\leq"),
    (r"\\(?:geqslant|ge)\b", r"\geq"),
    (r"\\ne\b", r"\neq"),
    (r"\\(?:dots|ldots|cdots)\b", r"\dots"),
    (r"\\degree\b", r"^\circ"),
    (r"\\textless\b", "<"),
    (r"\\textgreater\b", ">"),
    (r"\\lt\b", "<"),
    (r"\\gt\b", ">"),
    (r"\\textbar\b|\\mid\b|\\vert\b", "|"),
)
_DROP, _LETTER, _DIGIT, _SIGN = 0, 1, 2, 3
_DROPPED = frozenset(",.;:?'\"`。，、；：？…・「」『』《》〈〉【】\u3000")
_BACKSLASH, _OPEN, _CLOSE = ord("\\"), ord("{"), ord("}")
_PRIME = np.uint64(0x9E3779B97F4A7C15)


def key(text: pl.Expr) -> pl.Expr:
    """The key of a text column."""
    old, new = _simplified()
    text = (
        text.str.replace_many(list(_SIGNS), list(_SIGNS.values())).str.normalize("NFKC").str.to_lowercase().str.normalize("NFKC")
    )
    text = text.str.replace_many(list(_SIGNS), list(_SIGNS.values()))  # NFKC may have made some
    text = pl.when(text.str.contains(r"\p{Han}")).then(text.str.replace_many(old, new)).otherwise(text)
    text = text.str.replace_all(r"\\?_{2,}", " ").str.replace_all(_STYLE, " ").str.replace_all(_BLANK, " ")
    for pattern, alike in _ALIKE:
        text = text.str.replace_all(pattern, alike.replace("$", "$$"))
    return text.str.replace_all(r"\s+", " ").str.strip_chars()


def key_of(text: str) -> str:
    """The key of one text."""
    return pl.select(key(pl.lit(pl.Series([text])))).item()


@functools.cache
def _simplified() -> tuple[list[str], list[str]]:
    """OpenCC's traditional → simplified table over single characters, followed to its ends so that it is idempotent."""
    import opencc

    converter = opencc.OpenCC("t2s")
    blocks = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF))
    characters = [chr(code) for low, high in blocks for code in range(low, high + 1) if unicodedata.category(chr(code)) == "Lo"]
    converted = converter.convert("\n".join(characters)).split("\n")
    table = {old: new for old, new in zip(characters, converted, strict=True) if old != new and len(new) == 1}
    for old, new in table.items():
        while new in table and table[new] != old:
            new = table[new]
        table[old] = new
    return list(table), list(table.values())


@functools.cache
def _classes() -> np.ndarray:
    """uint8[0x110000]: each code point's class. Han, kana and whatever else writes without spaces are signs."""
    table = np.full(sys.maxunicode + 1, _SIGN, np.uint8)
    for code in range(0x30000):
        character = chr(code)
        category = unicodedata.category(character)
        if character in _DROPPED or category[0] in "ZC":
            table[code] = _DROP
        elif category == "Nd":
            table[code] = _DIGIT
        elif category[0] in "LM" and not (category == "Lo" and code >= 0x2E80):
            table[code] = _LETTER
    table[0xAC00:0xD7A4] = _LETTER  # Hangul is written with spaces
    return table


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of n texts, flat. hashes: uint64[t]; starts: int64[n+1], the texts' places in hashes; kinds: uint8[t], letters,
    digits or sign by the token's first character (a command is a sign); first: uint32[t], its first code point."""

    hashes: np.ndarray
    starts: np.ndarray
    kinds: np.ndarray
    first: np.ndarray

    def without(self, drop: np.ndarray) -> Tokens:
        """Those that the mask bool[t] leaves."""
        keep = ~drop
        kept_before = np.concatenate(([0], np.cumsum(keep)))
        return Tokens(self.hashes[keep], kept_before[self.starts], self.kinds[keep], self.first[keep])

    def rows(self) -> np.ndarray:
        """int64[t]: the text of each token."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def tokens(keys: pl.Series) -> Tokens:
    """The tokens of each key, braces among them."""
    codes, starts = code_points(keys)
    kinds = _classes()[codes]
    before = np.concatenate(([_DROP], kinds[:-1])).astype(np.uint8)
    joined = (kinds == before) & ((kinds == _LETTER) | (kinds == _DIGIT))
    after_backslash = np.concatenate(([False], codes[:-1] == _BACKSLASH))
    joined |= (kinds == _LETTER) & after_backslash
    joined[starts[:-1][starts[:-1] < len(codes)]] = False  # a text's first character joins nothing
    begins = ~joined & (kinds != _DROP)
    if not begins.any():
        empty = np.zeros(0, np.uint64)
        return Tokens(empty, np.zeros(len(starts), np.int64), empty.astype(np.uint8), empty.astype(np.uint32))
    begin = np.flatnonzero(begins)
    token_of = np.cumsum(begins) - 1
    powers = _powers(len(codes))[np.arange(len(codes)) - begin[np.maximum(token_of, 0)]]
    terms = np.where(kinds == _DROP, np.uint64(0), (codes.astype(np.uint64) + np.uint64(1)) * powers)
    hashes = mix(np.add.reduceat(terms, begin))
    return Tokens(hashes, np.searchsorted(begin, starts), kinds[begin], codes[begin])


def code_points(keys: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 code points of all texts, int64[n+1] starts)."""
    codes = np.frombuffer("".join(keys.to_list()).encode("utf-32-le"), np.uint32)
    lengths = keys.str.len_chars().to_numpy().astype(np.int64)
    return codes, np.concatenate(([0], np.cumsum(lengths)))


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: uint64 → uint64, each input bit reaching each output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=1)
def _power_table(size: int) -> np.ndarray:
    return np.cumprod(np.full(size, _PRIME, np.uint64))


def _powers(count: int) -> np.ndarray:
    """P^1, P^2, … at least `count` of them."""
    return _power_table(1 << max(16, count.bit_length()))


def bare(found: Tokens) -> Tokens:
    """For overlap and Jaccard: no braces at all, so that \\frac{1}{2} and \\frac12 differ by little."""
    return found.without((found.first == _OPEN) | (found.first == _CLOSE))


def exact_tokens(found: Tokens) -> Tokens:
    """For equality: braces around a single token go (\\sqrt{2} is \\sqrt 2), others stay (\\sqrt{2x} is not \\sqrt{2}x)."""
    if len(found.first) < 3:
        return found
    rows = found.rows()
    around = (found.first[:-2] == _OPEN) & (found.first[2:] == _CLOSE) & (rows[:-2] == rows[2:])
    drop = np.zeros(len(found.first), bool)
    drop[:-2] |= around
    drop[2:] |= around
    return found.without(drop)


def sequence_hashes(found: Tokens, salt: int = 0) -> np.ndarray:
    """uint64[n]: equal for equal sequences of tokens, else equal by chance with probability 2^-64."""
    place = np.arange(len(found.hashes)) - found.starts[:-1][found.rows()]
    terms = mix(found.hashes + np.uint64(salt)) * _powers(len(found.hashes))[place]
    return mix(_row_sums(terms, found.starts) + np.uint64(salt))


def content_hashes(found: Tokens) -> np.ndarray:
    """uint64[n]: equal where numbers, commands and operators are the same, in any order and whatever the words: the
    mathematics."""
    mathematical = (found.kinds == _DIGIT) | ((found.kinds == _SIGN) & (found.first < 0x2E80))
    other = found.without(~mathematical | (found.first == _OPEN) | (found.first == _CLOSE))
    return mix(_row_sums(mix(other.hashes), other.starts))


def number_hashes(found: Tokens) -> np.ndarray:
    """uint64[n]: of the digits alone, in any order; 0 where there are none."""
    return _row_sums(mix(found.without(found.kinds != _DIGIT).hashes), found.without(found.kinds != _DIGIT).starts)


def _row_sums(terms: np.ndarray, starts: np.ndarray) -> np.ndarray:
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)))
    return sums[starts[1:]] - sums[starts[:-1]]


def ngrams(found: Tokens, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 hashes, int64[n+1] starts): each text's SET of n-grams of tokens, ascending. A text shorter than `size` tokens
    has one n-gram, the whole of it; a text without tokens has none."""
    count = len(found.hashes)
    place, rows = np.arange(count), found.rows()
    ends = found.starts[1:][rows]
    padded = np.concatenate((found.hashes, np.zeros(size, np.uint64)))
    combined = np.zeros(count, np.uint64)
    for offset in range(size):
        inside = place + offset < ends
        combined = (combined + padded[offset : offset + count] * inside) * _PRIME
    whole = place + size <= ends
    whole[found.starts[:-1][np.diff(found.starts) > 0]] = True  # a short text is one n-gram
    # One sort finds each row's set: the row in the upper 32 bits, the hash in the lower. (np.unique hashes, which takes ten
    # times as long.)
    keyed = np.sort((rows[whole].astype(np.uint64) << np.uint64(32)) | (mix(combined[whole]) >> np.uint64(32)))
    keyed = keyed[np.diff(keyed, prepend=~keyed[:1]) != 0]
    return keyed.astype(np.uint32), np.searchsorted(keyed >> np.uint64(32), np.arange(len(found.starts)).astype(np.uint64))
