"""What a trial of the reward found, as tables: verdicts by reason and by source, groups, languages, examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from rich.table import Table
from rich.text import Text

from rollout.reward.scores import Score

EXAMPLES = 3
"""Of each reason."""
SOURCES = 20
"""The largest ones have a row of their own."""


@dataclass(slots=True)
class Summary:
    """Counts that grow with the batches; no texts are kept but the examples' details."""

    reasons: Counter[str] = field(default_factory=Counter)
    by_source: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    mixed: Counter[str] = field(default_factory=Counter)
    rights: dict[str, list[bool | None]] = field(default_factory=lambda: defaultdict(list))
    """Row → which of its outputs are right; None for one without a verdict, whose group fails."""
    tokens: list[int] = field(default_factory=list)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    """Reason → (which output, detail)."""

    def add(self, scores: Iterable[Score]) -> None:
        for each in scores:
            verdict, source = each.verdict, each.output.prompt.source
            self.reasons[verdict.reason] += 1
            self.by_source[source][verdict.reason] += 1
            self.mixed[source] += each.languages.mixed
            self.rights[each.output.row].append(verdict.right if verdict.judged else None)
            self.tokens.append(each.tokens)
            examples = self.examples[verdict.reason]
            if len(examples) < EXAMPLES and not verdict.right:
                examples.append((f"{each.output.row} · {each.output.index}", verdict.detail))

    @property
    def outputs(self) -> int:
        return self.reasons.total()

    @property
    def mixed_share(self) -> float:
        return self.mixed.total() / self.outputs if self.outputs else 0.0


def tables(summary: Summary) -> list[Table]:
    """Nothing empty among them."""
    made = [_by_reason(summary)]
    if len(summary.by_source) > 1:
        made.append(_by_source(summary))
    made.append(_measures(summary))
    if any(summary.examples.values()):
        made.append(_examples(summary))
    return made


def hints(summary: Summary, tagged: bool) -> list[str]:
    """What a user who sees this table may have overlooked."""
    if not tagged or summary.reasons["format"] < summary.outputs:
        return []
    details = [detail for _, detail in summary.examples["format"]]
    if all(detail.startswith("two_think_blocks") for detail in details):
        return ["every output opens its think block itself; if the prompts did not, write --prefill ''"]
    return ["no output has the R1 format; for outputs without its tags write --format none"]


def _by_reason(summary: Summary) -> Table:
    table = Table("verdict", title=f"{summary.outputs:,} outputs")
    table.add_column("outputs", justify="right")
    table.add_column("share", justify="right")
    for reason, count in summary.reasons.most_common():
        table.add_row(reason, f"{count:,}", f"{count / summary.outputs:.1%}")
    return table


def _by_source(summary: Summary) -> Table:
    reasons = [reason for reason, _ in summary.reasons.most_common()]
    table = Table("source", title="by source")
    for name in ("outputs", *reasons, "mixed languages"):
        table.add_column(name, justify="right")
    sources = sorted(summary.by_source, key=lambda source: (-summary.by_source[source].total(), source))
    for source in sources[:SOURCES]:
        counts = summary.by_source[source]
        total = counts.total()
        shares = (f"{counts[reason] / total:.1%}" for reason in reasons)
        table.add_row(Text(source or "–"), f"{total:,}", *shares, f"{summary.mixed[source] / total:.1%}")
    if len(sources) > SOURCES:
        table.caption = f"and {len(sources) - SOURCES} smaller sources"
    return table


def _measures(summary: Summary) -> Table:
    table = Table("measured, not punished", title="beside the verdicts")
    table.add_column("", justify="right")
    table.add_row("outputs that mix languages", f"{summary.mixed_share:.1%}")
    table.add_row("tokens, median", f"{np.median(summary.tokens):,.0f}")
    table.add_row("tokens, most", f"{max(summary.tokens):,}")
    groups = [rights for rights in summary.rights.values() if len(rights) > 1 and None not in rights]
    if groups:
        between = sum(0 < sum(rights) < len(rights) for rights in groups)
        table.add_row("questions with several outputs", f"{len(groups):,}")
        table.add_row("of them all right", f"{sum(all(rights) for rights in groups) / len(groups):.1%}")
        table.add_row("of them none right", f"{sum(not any(rights) for rights in groups) / len(groups):.1%}")
        table.add_row("of them in between: they teach", f"{between / len(groups):.1%}")
    return table


def _examples(summary: Summary) -> Table:
    table = Table("verdict", "output", "why and where", title="examples")
    for reason, _ in summary.reasons.most_common():
        for name, detail in summary.examples[reason]:
            table.add_row(reason, Text(name), Text(detail))
    return table
