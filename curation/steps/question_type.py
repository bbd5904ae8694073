"""Step 6: remove multiple-choice, true/false and proof questions, in Chinese and English. A guess is right too often in the
first two, and the third has no answer that a rule could verify.

The set's own word counts first (`kind`), then the text. All patterns are Rust regular expressions over whole columns.

- choice: options in order, as (A) … (B) … (C), or at the beginnings of lines; or less sure marks (A. B. C. within a line, an
  empty pair of brackets, "which of the following", 下列) together with an answer of letters.
- true_false: it says so ("true or false", 判断对错), or the answer is such a word.
- proof: "Prove that", "Show that", 求证, 证明 at the beginning of a sentence, and nothing else is asked; or the answer is
  "proof".
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl

from curation.store import Outcome, Removed, Rows

_SURE_OPTIONS = (
    r"(?s)[(（\[]\s*A\s*[)）\]].*?[(（\[]\s*B\s*[)）\]].*?[(（\[]\s*C\s*[)）\]]",
    r"(?s)\\(?:text|mathrm|textbf|mathbf)\s*\{\s*\(?A\)?[.:)]?\s*\}.*?\\(?:text|mathrm|textbf|mathbf)\s*\{\s*\(?B\)?[.:)]?\s*\}"
    r".*?\\(?:text|mathrm|textbf|mathbf)\s*\{\s*\(?C\)?[.:)]?\s*\}",
    r"(?ms)^\s*A\s*[.)．、:：）].*^\s*B\s*[.)．、:：）].*^\s*C\s*[.)．、:：）]",
)
_LIKELY_OPTIONS = (
    r"(?s)(?:^|[\s;；。.,，])A\s*[.)．、:：）].*?[\s;；。.,，]B\s*[.)．、:：）].*?[\s;；。.,，]C\s*[.)．、:：）]",
    r"[(（]\s*(?:\\q?quad|~|\s)*\s*[)）]\s*[.。．]?\s*$",
    r"(?i)which (?:one )?of the following|choose the (?:correct|best)|select the (?:correct|best)",
    r"下列|以下.{0,12}(?:正确|错误|成立|符合)|正确的(?:选项|是|有)|不正确的是|错误的是|选项",
)
_LETTERS = (
    r"^[\s$(（]*(?:\\(?:text|textbf|mathrm|boxed)\s*\{\s*)?\(?\s*[A-H](?:\s*[,，、;；]?\s*[A-H]){0,5}\s*\)?\s*\}?[\s.。．)）$]*$"
)
_ONE_LETTER_ANSWER_ASKED = r"(?i)enter the letters? of the correct|answer with the letter"
_SAYS_TRUE_FALSE = (
    r"(?i)\btrue or false\b|\btrue/false\b|\(\s*T\s*/\s*F\s*\)|state whether .{0,80}(?:true|false)",
    r"(?i)\bis (?:it|this|the statement) (?:true|false)\b",
    r"判断对错|判断题|判断正误|对的打|正确的打|的打[“\"]?[√✓]|[(（]\s*(?:判断|对错)\s*[)）]|(?:是否正确|对吗|是不是|正确吗)[?？]?",
)
_BINARY = (
    r"(?i)^\s*(?:\\text\s*\{)?\s*(?:true|false|yes|no|对|错|正确|错误|不正确|是|否|不是|√|×|✓|✗|对的|错的)\s*\}?\s*[.。]?\s*$"
)
_PROOF = (
    r"(?i)(?:^|[.;:!?。；：，,\n)）]\s*)(?:\(?\d{0,2}[.)]\s*)?(?:please\s+)?(?:prove|show|demonstrate|verify)\b(?:\s+or\s+disprove)?\s*(?:that|the\b|if\b|for\b|:)",
    r"求证|(?:^|[。；;：:,，.\n）)\d])\s*(?:试|请)?\s*证明",
)
_ASKS = (
    r"(?i)\b(?:find|compute|determine|calculate|evaluate|what|how many|how much|solve for|give the value)\b",
    r"求[^证]|多少|计算|等于几|是几",
)
_PROOF_ANSWER = r"(?i)^\s*(?:proof|proved|see (?:the )?(?:proof|solution)|证明(?:略|见.*|过程.*)?|见证明|qed)\s*[.。]?\s*$"


def _any(text: pl.Expr, patterns: tuple[str, ...]) -> pl.Expr:
    return pl.any_horizontal(text.str.contains(pattern) for pattern in patterns)


def question_type() -> pl.Expr:
    """ "choice", "true_false", "proof" or "" from the columns question, answer, kind."""
    # A drawing's code is full of (A), (B), (C).
    question = pl.col("question").str.replace_all(r"(?s)\[asy\].*?(?:\[/asy\]|$)", " ")
    answer, kind = pl.col("answer").fill_null(""), pl.col("kind")
    letters = answer.str.contains(_LETTERS)
    choice = (
        (kind == "choice")
        | _any(question, _SURE_OPTIONS)
        | question.str.contains(_ONE_LETTER_ANSWER_ASKED)
        | (letters & _any(question, _LIKELY_OPTIONS))
    )
    true_false = _any(question, _SAYS_TRUE_FALSE) & ~answer.str.contains(r"\d") | answer.str.contains(_BINARY)
    proof = (kind == "proof") | answer.str.contains(_PROOF_ANSWER) | (_any(question, _PROOF) & ~_any(question, _ASKS))
    return (
        pl.when(choice)
        .then(pl.lit("choice"))
        .when(true_false)
        .then(pl.lit("true_false"))
        .when(proof)
        .then(pl.lit("proof"))
        .otherwise(pl.lit(""))
    )


def remove_types(rows: Rows, progress: Callable[[int], None] = lambda _: None) -> Outcome:
    """Reasons: `choice`, `true_false`, `proof`. Exempt rows stay; a proof among them is for the judge."""
    reasons, proofs = [np.zeros(0, object)], [np.zeros(0, bool)]
    for frame in rows.batches("question", "answer", "kind", "exempt"):
        found = frame.select(kind=question_type(), exempt=pl.col("exempt"))
        exempt = found["exempt"].to_numpy()
        kinds = np.asarray(found["kind"].to_list(), object)
        proofs.append(exempt & (kinds == "proof"))
        reasons.append(np.where(exempt, "", kinds))
        progress(len(frame))
    reason = np.concatenate(reasons)
    gone = reason != ""
    judged = rows.numbers[np.concatenate(proofs)].tolist()
    return Outcome.without(rows, Removed.of(rows.numbers[gone], reason[gone]), for_judge=judged)
