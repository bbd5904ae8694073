"""What a person sees: complete at 80 columns, silent about nothing, and never the reason why a run ends."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console as Terminal

from trainer.console import Console, NullConsole
from trainer.console_view import Phase, State, clock, render, seconds_left, sparkline, stage_at, step_line

STAGES = ((0, "grpo+ter", 20), (1, "dapo-8k", 20), (2, "dapo-16k", 20))
ROW = {
    "kind": "train",
    "step": 22,
    "stage_name": "dapo-8k",
    "context": 8192,
    "reward/mean": 0.123,
    "reward/accuracy": 0.5612,
    "verdict/truncated": 0.041,
    "entropy/mean": 0.5634,
    "entropy/target": 0.55,
    "length/mean": 1843.2,
    "length/max": 8001,
    "sampling/rounds": 3,
    "sampling/over_generation": 2.25,
    "ledger/drawn": 81024,
    "ledger/trained": 23512,
    "ledger/uniform": 53448,
    "ledger/recovered": 3512,
    "ledger/expired": 512,
    "ledger/failed": 12,
    "ledger/pending": 28,
    "time/step": 41.0,
}
EVALUATION = {"kind": "eval", "step": 20, "name": "heldout", "pass@1": 0.534, "count": 200, "k": 4, "length/mean": 1200.0}
STATE = State(
    total_steps=60,
    stages=STAGES,
    started=0.0,
    now=3725.0,
    finished=22,
    row=ROW,
    entropies=tuple(0.5 + 0.01 * (step * 7 % 13) for step in range(30)),
    step_seconds=(40.0, 41.0, 300.0),
    phase=Phase("sampling", 512, "samples", started=3717.0, done=320, facts={"legitimate": "5/16", "tokens": 1234567}),
    evaluations={"heldout": EVALUATION},
    notes=("resumed from step 20", "weights pushed again [probe of engine 3]"),
)


def seen(state: State, width: int) -> str:
    terminal = Terminal(record=True, width=width, file=io.StringIO())
    terminal.print(render(state))
    return terminal.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_holds_everything_at_this_width(width):
    text = seen(STATE, width)
    assert all(cell_len(line) == width for line in text.splitlines())
    assert "…" not in text, "something was cut"
    words = ["stage 2 of 3, dapo-8k", "step 23 of 60", "sampling", "320/512 samples", "40.0/s", "0:00:08", "legitimate=5/16"]
    words += ["0.563", "target 0.550", "+0.12", "56.1%", "1,843 tokens", "8,001", "2.25×", "81,024 drawn", "recovered 3,512"]
    words += ["expired 512", "pass@1 53.4%", "at step 20", "resumed from step 20", "[probe of engine 3]", "1:02:05"]
    assert [word for word in words if word not in text] == []


def test_an_alarm_is_shown_whole_while_it_lasts():
    assert "ALARM" not in seen(STATE, 80)
    line = "length: mean length 159 tokens, mean of 5 steps, bound 200"
    text = seen(replace(STATE, alarms=(line, "mismatch: sampler and trainer disagree")), 80)
    assert text.count("ALARM") == 2
    assert line in text
    with Console(60, list(STAGES), stream=io.StringIO()) as console:
        console.alarms((line,))
        assert console._state.alarms == (line,)
        console.alarms(())
        assert console._state.alarms == ()


def test_the_sparkline_is_that_of_the_last_thirty_entropies():
    assert sparkline(STATE.entropies, 0.55) in seen(STATE, 80)
    assert len(sparkline(STATE.entropies)) == 30
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.5, 0.5]) == "▄▄"
    assert sparkline([]) == ""


@pytest.mark.parametrize("broken", [None, "text", float("nan"), "absent"])
def test_no_missing_or_odd_value_breaks_a_view(broken):
    for key in ROW:
        row = {name: value for name, value in ROW.items() if name != key}
        state = replace(STATE, row=row if broken == "absent" else {**row, key: broken})
        assert "entropy" in seen(state, 80)
        assert step_line(state)
    empty = State(total_steps=0, stages=())
    assert seen(replace(empty, row={"kind": "train"}, evaluations={"": {}}, phase=Phase("sync", None, "chunks", 0.0)), 80)


def test_a_step_belongs_to_the_stage_that_counts_it():
    assert [stage_at(STAGES, step) for step in (1, 20, 21, 60, 61)] == [(0, 19), (0, 0), (1, 19), (2, 0), (2, 0)]


def test_time_left_follows_the_median_step():
    assert seconds_left(STATE) == (18 * 41.0, 38 * 41.0)
    assert seconds_left(replace(STATE, step_seconds=())) is None
    assert seconds_left(replace(STATE, finished=60)) == (0.0, 0.0)
    assert clock(3725.9) == "1:02:05"


def test_plain_mode_prints_one_line_a_step_and_evaluation_and_none_a_phase():
    stream = io.StringIO()
    with Console(60, list(STAGES), stream=stream) as console:
        console.note("two\nlines")
        with console.phase("sampling", 4, "samples") as progress:
            progress.advance(2, legitimate="1/2")
        console.step(ROW)
        console.evaluation(EVALUATION)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "two lines"
    assert lines[1].startswith("step 22/60 · dapo-8k · reward +0.12 · accuracy 56.1% · entropy 0.563 (target 0.550)")
    assert lines[2].startswith("evaluation heldout pass@1 53.4% at step 20")
    assert len(lines) == 3


def test_a_long_phase_gives_a_sign_of_life_even_when_it_hangs():
    stream = io.StringIO()
    with Console(60, list(STAGES), stream=stream, heartbeat_seconds=0.05) as console:
        with console.phase("sampling", 512, "samples") as progress:
            progress.advance(320, legitimate="5/16")
            deadline = time.monotonic() + 10
            while not stream.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
        assert "sampling 320/512 samples" in stream.getvalue()
        assert "legitimate=5/16" in stream.getvalue()


def test_phases_nest_and_end_even_by_an_exception():
    console = Console(60, list(STAGES), stream=io.StringIO())

    def failing_phase():
        with console.phase("sampling", 4, "samples"):
            assert console._state.phase.name == "sampling"
            raise ValueError("engine")

    with console.phase("evaluate", None, "sets"):
        with pytest.raises(ValueError, match="engine"):
            failing_phase()
        assert console._state.phase.name == "evaluate"
    assert console._state.phase is None
    console.close()
    console.close()


def test_advances_of_several_threads_are_all_counted():
    with Console(60, list(STAGES), stream=io.StringIO()) as console, console.phase("rewarding", 4000, "samples") as progress:
        threads = [threading.Thread(target=lambda: [progress.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert console._state.phase.done == 4000


def test_a_reader_who_goes_away_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, _text):
            raise BrokenPipeError

    with Console(60, list(STAGES), stream=Gone()) as console:
        console.step(ROW)
        console.note("still here")


def test_a_full_disk_costs_its_lines_and_not_those_after():
    """As where the output goes to a file there."""

    class Full(io.StringIO):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(text)

    stream = Full()
    with Console(60, STAGES, stream=stream) as console:
        console.note("lost")
        stream.full = False
        console.note("there is room again")
    assert stream.getvalue() == "there is room again\n"


def test_the_null_console_takes_every_call():
    with NullConsole() as console:
        with console.phase("sampling", 4, "samples") as progress:
            progress.advance(2, legitimate="1/2")
        console.step({})
        console.evaluation({})
        console.note("")
        console.alarms(("a",))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_terminal_has_its_cursor_after_any_death(ending):
    code = """
        import time
        from trainer.console import Console
        console = Console(60, [(0, "grpo", 60)])
        with console.phase("sampling", 512, "samples") as progress:
            progress.advance(3)
            time.sleep(0.6)
            print("READY", flush=True)
            time.sleep(60)
    """
    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    output, sent = b"", False
    while True:
        try:
            output += os.read(ours, 65536)
        except OSError:  # Linux ends a pty's stream with an error
            break
        if not sent and b"READY" in output:
            child.send_signal(ending)
            sent = True
    assert child.wait(20) != 0
    os.close(ours)
    assert b"sampling" in output
    assert b"Keju" in output
    assert output.rfind(b"\x1b[?25h") > output.rfind(b"\x1b[?25l") >= 0
    assert b"\x1b[?1049h" not in output, "an alternate screen would need a repair"
