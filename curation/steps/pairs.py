"""What two near questions have to do with each other: shared by the steps that compare pairs.

Near is not the same in mathematics: "Compute \\sin 60°" and "Compute \\sin 45°" are near, and two questions. The paper compares
texts alone. Here a near pair is TWO questions where the answers say so:

    both answers are numbers       and differ
    both answers have digits       and not the same ones ("26" and "48+9\\sqrt{3}")
    else: their texts differ,      and so do the questions' numbers, commands and operators

An equal answer leaves the pair one question, and so does an answer that cannot be compared, with equal mathematics. Embeddings
hardly see a number, so questions near in meaning alone are one only where their digits are the same, or, where there are none,
their answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from curation.store import Rows


@dataclass(frozen=True, slots=True)
class Answers:
    """value: float64[n], NaN where the answer is no number; text, numbers, content: uint64[n] hashes of the answer, of its
    digits (0 without), and of the question's mathematics."""

    value: np.ndarray
    text: np.ndarray
    numbers: np.ndarray
    content: np.ndarray

    @classmethod
    def of(cls, rows: Rows, texts_alone: bool = False) -> Answers:
        """texts_alone: all equal, so that no pair is ever two questions."""
        if texts_alone:
            same = np.zeros(len(rows), np.uint64)
            return cls(np.zeros(len(rows)), same, same, same)
        return cls(*(rows.column(name) for name in ("answer_value", "answer_hash", "answer_numbers", "content")))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.value, self.text, self.numbers, self.content

    def differ(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Do the answers of these pairs say that they are two questions? Indices of any shapes that broadcast; bool of that
        shape."""
        with np.errstate(invalid="ignore"):
            return two_questions(*(each for column in self.columns() for each in (column[left], column[right])))


@numba.vectorize(["boolean(float64,float64,uint64,uint64,uint64,uint64,uint64,uint64)"], cache=True)
def two_questions(value, other_value, text, other_text, numbers, other_numbers, content, other_content):
    """The rule above, for one pair or arrays of them."""
    if not np.isnan(value) and not np.isnan(other_value):
        return abs(value - other_value) > 1e-9 * max(abs(value), abs(other_value))
    if numbers != 0 and other_numbers != 0 and numbers != other_numbers:
        return True
    return text != other_text and content != other_content


def ids_of(rows: Rows, numbers: np.ndarray) -> np.ndarray:
    """The ids of these rows of the file, in the order given, repeats included."""
    distinct, place = np.unique(numbers, return_inverse=True)
    return np.asarray(rows.at(distinct).frame("id")["id"].to_list(), object)[place] if len(numbers) else np.zeros(0, object)
