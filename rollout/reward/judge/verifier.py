"""The judge as the reward sees it: a prompt and a response in, a verdict out, within a deadline, whatever the endpoint does.

What gets no decision (endpoint down, deadline, budget, no readable reply) is `unjudged`, which is neither right nor wrong. Only
decisions are kept; what stays unjudged is asked again if it comes again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rollout.errors import InputError
from rollout.reward.format import Response
from rollout.reward.judge.decision import Decision
from rollout.reward.judge.endpoint import Batch, Endpoint, Unanswered
from rollout.reward.judge.request import Case, quote
from rollout.reward.judge.settings import JudgeSettings, address_fault, api_key
from rollout.reward.judge.store import Store, key_of
from rollout.types import Prompt, Verdict

CANCEL_SECONDS = 5.0
"""For requests that are called off to end."""

Result = TypeVar("Result")


@dataclass(slots=True)
class Counts:
    """Since the last `measured`, on this rank: different cases by what became of them, and what that cost."""

    decided: int = 0
    found: int = 0
    """Decided before; nothing was asked."""
    unjudged: int = 0
    requests: int = 0
    tokens: int = 0
    retries: int = 0


class PendingVerdicts:
    """What `JudgeVerifier.start` returns."""

    def __init__(self, future: Future[list[Verdict]], count: int) -> None:
        self._future, self._count = future, count

    def result(self) -> list[Verdict]:
        try:
            return self._future.result()
        except CancelledError:
            return [Verdict.unjudged("the judge was closed")] * self._count
        except KeyboardInterrupt:
            self._future.cancel()
            raise


class JudgeVerifier:
    """One a rank. A context manager; `close` ends its thread and its connections.

    store: file of the decisions; None: in memory. ranks: among how many a run's budget is shared. note: told, once, that the
    budget is spent, and each time that the endpoint goes silent or answers again.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        *,
        store: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Connects to nothing yet. Raises InputError for an address or key that cannot be used, and for a broken store."""
        fault = address_fault(settings.base_url)
        if fault is not None:
            raise InputError(f"reward.judge.base_url: {fault}")
        key = api_key(settings)
        self._settings, self._note = settings, note
        self._counts = Counts()
        self._silent = False
        self._said_spent = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="keju-judge-endpoint", daemon=True)
        self._thread.start()

        async def connect() -> None:
            self._store = Store(store, note)
            self._spent = self._store.spent()
            shares = [_share(budget, rank, ranks) for budget in (settings.budget_requests, settings.budget_tokens)]
            self._endpoint = Endpoint(settings, key, self._spent, *shares)

        try:
            self._run(connect())
        except BaseException:
            self._end_thread()
            raise

    def verify(self, pairs: list[tuple[Prompt, Response]]) -> list[Verdict]:
        """One verdict for each (prompt, response), in order, within deadline_seconds and a moment."""
        return self.start(pairs).result()

    def start(self, pairs: list[tuple[Prompt, Response]]) -> PendingVerdicts:
        """The same, while the caller does something else. Equal cases of one call are asked once."""
        return PendingVerdicts(asyncio.run_coroutine_threadsafe(self._judge(pairs), self._loop), len(pairs))

    def measured(self) -> Counts:
        """What was counted since the last call."""

        async def take() -> Counts:
            counts, self._counts = self._counts, Counts()
            return counts

        return self._run(take())

    def close(self) -> None:
        """Calls off what is under way. May be called again."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=CANCEL_SECONDS)
            await self._endpoint.close()
            self._store.close()

        try:
            self._run(end())
        finally:
            self._end_thread()

    def __enter__(self) -> JudgeVerifier:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # in the loop's thread

    async def _judge(self, pairs: list[tuple[Prompt, Response]]) -> list[Verdict]:
        cases = [Case.of(prompt, response, self._settings) for prompt, response in pairs]
        verdicts: dict[Case, Verdict] = {}
        keys: dict[Case, bytes] = {}
        for case in dict.fromkeys(cases):
            if (refused := self._without_asking(case)) is not None:
                verdicts[case] = refused
                continue
            keys[case] = key_of(case, self._settings)
            if (known := self._store.find(keys[case])) is not None:
                self._counts.found += 1
                verdicts[case] = self._verdict(known)
        asked = [case for case in keys if case not in verdicts]
        if asked:
            before, retries = replace(self._spent), self._endpoint.retries
            try:
                verdicts |= await self._ask(asked, keys)
            finally:
                self._counts.requests += self._spent.requests - before.requests
                self._counts.tokens += self._spent.tokens - before.tokens
                self._counts.retries += self._endpoint.retries - retries
        return [verdicts[case] for case in cases]

    def _without_asking(self, case: Case) -> Verdict | None:
        limit = self._settings.max_answer_chars
        if len(case.answer) > limit:
            return Verdict(False, "wrong", f"an answer of {len(case.answer)} characters; a judge is given {limit} at most")
        if not quote(case.answer).strip():
            return Verdict(False, "wrong", "nothing in the answer can be seen")
        return None

    async def _ask(self, cases: list[Case], keys: dict[Case, bytes]) -> dict[Case, Verdict]:
        """Of the cases that nobody has decided. An endpoint that was not heard in a whole batch is tried with one case first, so
        that a dead one costs one try and not a deadline each time."""
        deadline = asyncio.get_running_loop().time() + self._settings.deadline_seconds
        verdicts: dict[Case, Verdict] = {}
        batch = Batch(1, deadline)
        if self._silent:
            verdicts = await self._ask_all(cases[:1], keys, batch)
            why = f"the endpoint has been silent: {verdicts[cases[0]].detail}"
        if not self._silent or batch.heard:
            batch = Batch(self._settings.tries, deadline, heard=batch.heard)
            again = [case for case in cases if case not in verdicts or not verdicts[case].judged]
            verdicts |= await self._ask_all(again, keys, batch)
        else:
            verdicts = dict.fromkeys(cases, Verdict.unjudged(batch.ended or why))
        self._counts.unjudged += sum(not verdict.judged for verdict in verdicts.values())
        self._watch(verdicts, batch)
        return verdicts

    async def _ask_all(self, cases: list[Case], keys: dict[Case, bytes], batch: Batch) -> dict[Case, Verdict]:
        loop = asyncio.get_running_loop()
        verdicts: dict[Case, Verdict] = {}

        async def one(case: Case) -> None:
            try:
                decision = await self._endpoint.decide(case, batch)
                self._store.keep(keys[case], decision)
                self._counts.decided += 1
                verdicts[case] = self._verdict(decision)
            except Unanswered as error:
                verdicts[case] = Verdict.unjudged(str(error))
            finally:
                self._store.keep_spent(self._spent)

        tasks = [loop.create_task(one(case)) for case in cases]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=max(0.0, batch.deadline - loop.time()))
        finally:
            late = [task for task in tasks if not task.done()]
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=CANCEL_SECONDS)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()  # a defect in here must not pass for a silent endpoint
        unjudged = Verdict.unjudged(f"no verdict within {self._settings.deadline_seconds:g} s")
        return {case: verdicts.get(case, unjudged) for case in cases}

    def _watch(self, verdicts: dict[Case, Verdict], batch: Batch) -> None:
        """Notes, where something has changed."""
        if (spent := self._endpoint.exhausted()) is not None:
            if not self._said_spent:
                self._said_spent = True
                self._note(f"judge: {spent}; nothing more is judged")
            return
        if not batch.heard and not self._silent:
            why = next(iter(verdicts.values())).detail
            self._note(f"judge: the endpoint is silent, {len(verdicts)} samples have no verdict: {why}")
        elif self._silent and batch.heard:
            self._note("judge: the endpoint answers again")
        self._silent = not batch.heard

    def _verdict(self, decision: Decision) -> Verdict:
        return decision.verdict(process_counts=self._settings.process_counts)


def check_endpoint(settings: JudgeSettings) -> None:
    """One small question, with all that a real one has. Raises InputError, one line, where no verdict comes back."""
    prompt = Prompt("check", "(1) 1 + 1 = ? (2) Is 7 prime?", "(1) 2 (2) yes", metadata={"judge": True})
    response = Response("One and one are two. Only 1 and 7 divide 7.", "(1) 2 (2) Yes, 7 is prime.")
    deadline = min(settings.deadline_seconds, 2 * settings.timeout_seconds)
    with JudgeVerifier(replace(settings, budget_requests=None, budget_tokens=None, deadline_seconds=deadline)) as judge:
        (verdict,) = judge.verify([(prompt, response)])
    if not verdict.judged:
        raise InputError(
            f"reward.judge.base_url: {settings.base_url}: no verdict from {settings.model}: {verdict.detail}; start it, "
            "or mend reward.judge (reason_chars: null where it refuses the schema's maxLength)"
        )


def _share(budget: int | None, rank: int, ranks: int) -> int | None:
    """A rank's part; the parts of all sum to the whole."""
    return None if budget is None else budget // ranks + (rank < budget % ranks)
