"""Watches a rank for the life of a run, from two daemon threads: says once a second how far it is, raises the alarm where it does
not get on, and hears the request to stop.

    RUN/health/rank-00000.json      how far the rank is (`trainer.hang_report.Health`)
    RUN/health/rank-00000.stack     where faulthandler writes on SIGUSR1
    RUN/health/report-<UTC>.txt     what hung, where, and every rank's stack
    RUN/stop                        touch it, and the run stops with a checkpoint

One thread (`_guard`) never waits for anything outside: it holds the clock, and hears signals even while the main thread sits in a
C call, because the interpreter writes their numbers into a pipe at once. The other (`_post`) talks to the board and to the file
system, and may wait.

An alarm is one for all ranks: the first to claim it on the board writes the report, the others see it there and end with it. All
exit with code 3; frozen ones on the writer's host are killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from rollout import cli, deadline, process
from rollout.deadline import EXIT_HUNG
from rollout.errors import EngineError, InputError, RunStopped
from rollout.pulse import Pulse
from trainer.hang_report import Health
from trainer.report_writer import ReportWriter, health_path, stack_path

POST_SECONDS = 1.0
QUIET_POST_SECONDS = 3.0
"""Between two posts of a rank that does not get on; well below `trainer.hang_report.QUIET_SECONDS`."""
BOARD_SECONDS = 5.0
"""For a word with the board, before the alarm goes on without it."""
CLAIM_SECONDS = 15.0
"""For the board to say who writes the report: on a loaded machine more patience is one report instead of two."""
ALARM_SECONDS = 60.0
"""From the alarm to the end, whatever the board and the file system do."""
FOLLOW_SECONDS = 30.0
"""How long a rank waits for the report that another one writes."""
FAILED_SECONDS = 30.0
"""How long a rank goes on after another one ended with an error."""
PEER_SECONDS = 5.0
"""How long an exception may wait for the news that another rank is gone."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "stop"


class RunBoard(Protocol):
    """Words for all ranks, by key (`trainer.distributed.StoreBoard`). May raise anything, and wait."""

    def set(self, key: str, text: str) -> None: ...

    def get(self, key: str) -> str | None: ...

    def claim(self, key: str) -> bool:
        """Whether this rank is the first to ask."""
        ...


class Watch:
    """A context manager around all that a rank does. main: the main thread's pulse; ahead: that of the thread which samples
    ahead.

    seconds: how long a pulse may stand still. stop_seconds: from the request to stop to the end. clear: a request that was there
    before the start is none. parent: the process that this one must not outlive. launch: its name (`trainer.launch.launch_name`).
    """

    def __init__(
        self,
        run: Path,
        rank: int,
        size: int,
        *,
        seconds: float,
        stop_seconds: float,
        clear: bool = False,
        parent: int | None = None,
        launch: str = "",
    ) -> None:
        self._run, self._rank, self._size = run, rank, size
        self._seconds, self._stop_seconds, self._clear, self._parent = seconds, stop_seconds, clear, parent
        self.main, self.ahead = Pulse(), Pulse(phase="sampling ahead")
        self._launch = launch
        self._host, self._pid, self._birth = socket.gethostname(), os.getpid(), process.birth(os.getpid())
        self._space = process.space()
        self._board: RunBoard | None = None
        self._met = size == 1
        self._peers: dict[int, Health] = {}
        self._gone: dict[int, float] = {}
        self._stop: tuple[float, str] | None = None
        self._signals: list[int] = []
        self._over, self._wake, self._alarmed = threading.Event(), threading.Event(), threading.Lock()
        self._end, self._code, self._why = "", 0, ""
        self._undo: list[Callable[[], object]] = []

    # what the run asks

    def stopping(self) -> bool:
        """Whether the run is to stop. Known to all ranks within seconds; rank 0 decides where."""
        return self._stop is not None

    def join(self, board: RunBoard) -> None:
        """From here on the ranks know of each other."""
        self._board = board
        self._wake.set()

    def met(self) -> None:
        """All ranks are there."""
        self._met = True

    # its life

    def __enter__(self) -> Watch:
        folder = health_path(self._run, 0).parent
        folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0 and self._clear:
            (self._run / STOP_FILE).unlink(missing_ok=True)
        self._stacks: IO[bytes] = stack_path(self._run, self._rank).open("wb")
        self._undo.append(self._stacks.close)
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True, chain=False)
        self._undo.append(lambda: faulthandler.unregister(signal.SIGUSR1))
        deadline.report_to(lambda why: self.alarm(why, exact=True))
        self._undo.append(lambda: deadline.report_to(None))
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        self._undo += [lambda: os.close(ours), lambda: os.close(theirs)]
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, lambda *_: None) for number in heard(SIGNALS)}
            fd = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
            self._undo.append(lambda: signal.set_wakeup_fd(fd))
            self._undo.append(lambda: [signal.signal(number, handler) for number, handler in before.items()])
        self._threads = [
            threading.Thread(target=self._guard, args=(ours,), name="keju-watch", daemon=True),
            threading.Thread(target=self._post, name="keju-post", daemon=True),
        ]
        self.main.stir()
        self._wake.set()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (InputError, EngineError, RunStopped)) or cli.refused(error):
            self._why = cli.line_of(error)
        elif isinstance(error, Exception):
            self._await_news()  # a collective that fails because another rank is gone is no defect of this one
        self._end = "ended" if error is None else f"ended: {type(error).__name__}"
        self._code = 0 if error is None else cli.code_of(error)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(BOARD_SECONDS)
        if self._rank == 0 and self._code != 1 and not isinstance(error, EngineError):  # else it is still to be stopped
            (self._run / STOP_FILE).unlink(missing_ok=True)
        while self._undo:
            self._undo.pop()()

    def _await_news(self) -> None:
        """Where another rank is gone or has raised the alarm, the process ends with it, in here."""
        end = time.monotonic() + PEER_SECONDS
        while self._size > 1 and time.monotonic() < end and self._board is not None:
            self._wake.set()
            time.sleep(0.1)

    # the clock

    def _guard(self, signals: int) -> None:
        while not self._over.is_set():
            if select.select([signals], [], [], min(POST_SECONDS, self._seconds / 4))[0]:
                for number in os.read(signals, 64):
                    self._hear(number)
            if self._parent is not None and os.getppid() != self._parent:
                os._exit(EXIT_HUNG)  # where the kernel does not see to it
            if self.main.silent() > self._seconds:
                self.alarm(f"{self._who} has not got on for {self._seconds:g} s (parallel.timeout_seconds)")
            if self.ahead.waits and self.ahead.silent() > self._seconds:
                self.alarm(f"{self._who} waits for {self._seconds:g} s (parallel.timeout_seconds) for others to sample ahead")
            if self._stop is not None and time.monotonic() - self._stop[0] > self._stop_seconds:
                late = f"the run was asked to stop ({self._stop[1]}) and has not within {self._stop_seconds:g} s"
                self.alarm(f"{late} (checkpoint.stop_seconds)", exact=True)

    def _hear(self, number: int) -> None:
        if number not in SIGNALS:
            return
        self._signals.append(number)
        # Before the ranks have met nothing has begun, and one that is gone would be waited for.
        if len(self._signals) > 1 or not self._met:
            os._exit(128 + number)
        self._ask_to_stop(f"{signal.Signals(number).name} at rank {self._rank}")
        self._wake.set()

    def _ask_to_stop(self, why: str) -> None:
        if self._stop is None:
            self._stop = time.monotonic(), why

    # the words

    def _post(self) -> None:
        posted: tuple[object, ...] = ()
        last = 0.0
        while True:
            self._wake.wait(POST_SECONDS)
            self._wake.clear()
            over = self._over.is_set()
            health = self.health()
            place = (health.step, health.phase, health.place, health.waits, health.sequence)
            now = (*place, health.launches, self._board is not None)
            if over or now != posted or health.said - last > QUIET_POST_SECONDS:
                self._publish(health)
                posted, last = now, health.said
            if over:
                return
            for look in (self._look_for_stop, self._look_for_alarm, self._look_at_peers):
                with contextlib.suppress(Exception):  # a board or a file system out of reach; `_guard` holds the clock
                    look()

    def _publish(self, health: Health) -> None:
        with contextlib.suppress(Exception):
            path = health_path(self._run, self._rank)
            beside = path.with_suffix(".tmp")
            beside.write_text(health.to_json() + "\n", encoding="utf-8")
            beside.replace(path)
        with contextlib.suppress(Exception):
            if self._board is not None:
                self._board.set(f"health/{self._rank}", health.to_json())

    def _look_for_stop(self) -> None:
        if self._rank == 0 and (self._run / STOP_FILE).exists():
            self._ask_to_stop(f"{self._run / STOP_FILE}")
        if self._board is None:
            return
        if self._stop is not None:
            self._board.set("stop", self._stop[1])
        elif (why := self._board.get("stop")) is not None:
            self._ask_to_stop(why)

    def _look_for_alarm(self) -> None:
        if self._board is not None and self._board.get("alarm") is not None:
            self.alarm("another rank raised the alarm")

    def _look_at_peers(self) -> None:
        """Of this host: a process that is gone without a word keeps everybody waiting."""
        if self._board is None:
            return
        for rank in range(self._size):
            if rank not in self._peers and rank != self._rank and (text := self._board.get(f"health/{rank}")) is not None:
                self._peers[rank] = Health.from_json(text)
        own = self.health()
        for rank, peer in self._peers.items():
            if not peer.beside(own) or process.alive(peer.pid, peer.born):
                continue
            since = self._gone.setdefault(rank, time.monotonic())
            end = Health.from_json(self._board.get(f"health/{rank}") or peer.to_json()).end
            patience = 0.0 if not end else float("inf") if end == "ended" else FAILED_SECONDS
            if time.monotonic() - since > patience:
                self.alarm(f"{peer.who} is gone" + (f" ({end})" if end else ""))

    def health(self) -> Health:
        main = self.main
        waits = main.waits or "".join(deadline.under_way()[-1:]).removeprefix(f"rank {self._rank}: ")
        return Health(
            self._rank, self._host, self._pid, self._birth, step=main.step, phase=main.phase, place=main.place(),
            waits=waits, sequence=main.sequence, silent=round(main.silent(), 1),
            said=time.monotonic(), launches=self._launches(), space=self._space, held=main.held,
            end=self._end, code=self._code, why=self._why,
        )  # fmt: skip

    def _launches(self) -> list[str]:
        """Of all ranks that this one knows of."""
        return sorted({self._launch, *(name for peer in list(self._peers.values()) for name in peer.launches)} - {""})

    @property
    def _who(self) -> str:
        return f"rank {self._rank} ({self._host}, pid {self._pid})"

    # the alarm

    def alarm(self, why: str, *, exact: bool = False) -> NoReturn:
        """From any thread. Ends the process, with a report by this rank or another. exact: `why` tells a person more than who is
        behind whom."""
        if not self._alarmed.acquire(blocking=False):
            threading.Event().wait()
        try:
            writing = threading.Thread(target=self._raise_alarm, args=(why, exact), name="keju-alarm", daemon=True)
            writing.start()
            writing.join(ALARM_SECONDS)
        finally:
            os._exit(EXIT_HUNG)

    def _raise_alarm(self, why: str, exact: bool) -> None:
        writer = ReportWriter(self._run, self.health(), self._size, self._stacks, self._board)
        if self._board is None or bounded(lambda: self._board.claim("alarm-claim"), True, CLAIM_SECONDS):
            self._write(writer, why, exact)
        else:
            self._follow(writer, why)

    def _write(self, writer: ReportWriter, why: str, exact: bool) -> None:
        bounded(lambda: self._board.set("alarm", json.dumps({"host": self._host, "space": self._space, "why": why})))
        try:
            path, first = writer.write(why)
            say(f"{why if exact else first}; report: {path}")
        except Exception as error:
            path = None
            say(f"{why}; no report could be written ({type(error).__name__}: {error})")
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        bounded(lambda: self._board.set("report", str(path)))
        writer.kill_the_rest()

    def _follow(self, writer: ReportWriter, why: str) -> None:
        told = bounded(lambda: self._wait_for("alarm", BOARD_SECONDS), None, 2 * BOARD_SECONDS)
        if told is not None and (json.loads(told)["host"], json.loads(told)["space"]) != (self._host, self._space):
            bounded(lambda: self._board.set(f"stack/{self._rank}", writer.own_stack()))
        if bounded(lambda: self._wait_for("report", FOLLOW_SECONDS), None, FOLLOW_SECONDS + BOARD_SECONDS) is None:
            say(f"{why}; no report came from the rank that meant to write it")

    def _wait_for(self, key: str, seconds: float) -> str | None:
        end = time.monotonic() + seconds
        while (text := self._board.get(key)) is None and time.monotonic() < end:
            time.sleep(0.1)
        return text


def heard(signals: Sequence[signal.Signals]) -> list[signal.Signals]:
    """Those that whoever started this process does not want it to ignore: nohup, or a shell's `&`, does."""
    return [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]


def say(line: str) -> None:
    with contextlib.suppress(Exception):
        print(f"keju: error: {line}", file=sys.stderr, flush=True)


def bounded(ask: Callable[[], Any], otherwise: Any = None, seconds: float = BOARD_SECONDS) -> Any:
    """What `ask` returns; `otherwise` where it raises or takes too long."""
    answers: list[Any] = []

    def work() -> None:
        with contextlib.suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise
