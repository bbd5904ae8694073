"""Dynamic sampling with Recent Sample Recovery (Algorithm 1 of arXiv 2506.18330), and the ledger of every prompt drawn.

    B_c ← B_r
    repeat: sample questions from the current policy, G outputs each; reward; filter; append the legitimate groups to B_c
    until |B_c| ≥ N
    train on B_c[:N];  B_r ← B_c[N:], for the next step only

At least one round is sampled, also where B_r alone fills the batch. "For the next step only": a group that was already recovered
once and still finds no place expires, so nothing older than one policy step is ever trained on; `max_age` lifts that bound, for
whoever wants to measure it. Pure decisions, no engine and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from rollout.types import Group


@dataclass(slots=True)
class Ledger:
    """Counts of prompts over the whole run. Every prompt drawn ends in exactly one of the six below `drawn`, or waits in the
    recovery buffer: drawn = trained + uniform + recovered + expired + aborted + failed + pending."""

    drawn: int = 0
    trained: int = 0
    """Trained on in the step that drew it."""
    uniform: int = 0
    """All outputs right or all wrong: filtered."""
    recovered: int = 0
    """Trained on in a later step than the one that drew it: the next, unless recovery.max_age says otherwise."""
    expired: int = 0
    """Legitimate surplus that was never trained on."""
    aborted: int = 0
    """Still decoding when enough groups were legitimate (batch.abort_surplus): dropped."""
    failed: int = 0
    """Never became a group: the prompt is too long, or sampling it failed, or a sample of it has no verdict."""

    def pending(self) -> int:
        """Prompts that must be in the recovery buffer; 0 when the run has ended."""
        return self.drawn - self.trained - self.uniform - self.recovered - self.expired - self.aborted - self.failed

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def legitimate(group: Group) -> bool:
    """0 < right < G: the outputs disagree, so the group teaches something. Where a sample has no verdict that cannot be known."""
    return group.judged and 0 < group.right < len(group.verdicts)


def kept(group: Group, dynamic: bool) -> bool:
    """Whether the group may be trained on: every group that is judged, or with dynamic sampling the legitimate ones."""
    return legitimate(group) if dynamic else group.judged


@dataclass(slots=True)
class BatchCollector:
    """Collects one step's batch. `recovered` is the last step's buffer; `ledger` is counted up in place.

    dynamic False (stage 1): every judged group is taken, nothing is filtered and there is no surplus to recover.
    """

    step: int
    needed: int
    dynamic: bool
    recovered: Sequence[Group]
    ledger: Ledger
    sampled: list[Group] = field(default_factory=list)
    """Every group sampled in this step, legitimate or not, for the metrics."""
    rounds: int = 0
    _batch: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._batch.extend(self.recovered)

    @property
    def collected(self) -> int:
        """|B_c|."""
        return len(self._batch)

    @property
    def complete(self) -> bool:
        return self.rounds > 0 and self.collected >= self.needed

    def add_round(self, groups: Sequence[Group], drawn: int, aborted: int = 0) -> None:
        """One round's groups, in the order their prompts were drawn. drawn: how many prompts; aborted: how many of them were
        dropped while they decoded; what else is missing has failed, and so has a group that was not judged."""
        self.rounds += 1
        self.sampled.extend(groups)
        judged = sum(group.judged for group in groups)
        taken = [group for group in groups if kept(group, self.dynamic)]
        self._batch.extend(taken)
        self.ledger.drawn += drawn
        self.ledger.aborted += aborted
        self.ledger.failed += drawn - judged - aborted
        self.ledger.uniform += judged - len(taken)

    def finish(self, *, recover: bool, capacity: int | None = None, max_age: int | None = 1) -> tuple[list[Group], list[Group]]:
        """(the N groups to train on, the next step's recovery buffer). Called once, when `complete`. max_age: steps after which
        a group that found no place expires; None: never."""
        batch, surplus = self._batch[: self.needed], self._batch[self.needed :]
        young = [group for group in surplus if recover and (max_age is None or self.step - group.drawn_step < max_age)]
        buffer = young[:capacity]
        now = sum(group.drawn_step == self.step for group in batch)
        self.ledger.trained += now
        self.ledger.recovered += len(batch) - now
        self.ledger.expired += len(surplus) - len(buffer)
        return batch, buffer
