"""`python -m benchmarks.serving MODEL… [--rates 0.5,1,2,4] [--out FILE.json]`: servers at rising rates, the paper's figure 5.

    python -m benchmarks.serving models/confucius models/confucius-fp8 --out serving.json      # one after the other
    python -m benchmarks.serving models/confucius-fp8 --url http://HOST:8000                   # a server that runs already

Each MODEL is served by `python -m rollout.serve MODEL --load` and asked by vLLM's own client (`vllm bench serve`): random
prompts, outputs of the full length, arrivals of a Poisson process for --seconds at each rate. Beside FILE.json lies a picture.

Lengths: prompts of the paper's 115 tokens on average. It does not say how long its outputs were; 8,000 is ours: 31,994 tokens/s
at its highest rate of 4 requests a second would be that many each. --scale multiplies both. Its figure is of 8 replicas on H800s.

A rate is held where waiting has stopped growing: a server that finishes c requests of the r that come in a second lets latency
grow by r / c - 1 seconds a second. It is read off the median of those sent in the last third of the time of sending against that
of the middle third, of the whole latency and of the time to the first token (where the last requests are left alone they are
quick to end), whichever grows more; more than GROWTH is not held, and latencies then say how long was sent, nothing else. Where
nothing grows and the median latency is above a third of the time of sending, the server was still filling and nothing is said:
give more --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.vllm_log import linear_kernels
from rollout import serve
from rollout.cli import Parser, number, run
from rollout.environment import provenance
from rollout.errors import EngineError, InputError
from rollout.evaluate.cli import device_name, vllm_version
from rollout.model_folder import longest_context, read_config
from rollout.vllm.server_plugin import KEY_VARIABLE

PAPER_RATES = "0.5,1,1.5,2,2.5,3,3.5,4"
PAPER_INPUT_TOKENS = 115
OUTPUT_TOKENS = 8000
SPARE_TOKENS = 64
"""Of the server's context: a random prompt may come out a little longer than was asked for."""
LEAST_REQUESTS = 9
"""At one rate: three in each third of the time of sending; a median of fewer says nothing."""
WARMUPS = 2
GROWTH = 0.1
HELD = {True: "yes", False: "NO", None: "unsettled"}
CLIENT_SETTINGS = ("input_tokens", "output_tokens", "seconds", "burstiness", "seed")
SERVER_SETTINGS = ("dtype", "max_sequences", "kv_cache_gib", "tensor_parallel", "threads")
"""Ours to choose where the server is; of one behind --url they are not known, as the machine is the client's."""
POLL_SECONDS = 0.5
END_SECONDS = 30.0
"""How long a server that was told to end may take before it is killed."""
START = (
    "import sys; from rollout.vllm.server_plugin import die_with_parent; die_with_parent(int(sys.argv.pop(1))); "
    "from rollout import cli, serve; cli.run(serve.main)"
)
"""`python -m rollout.serve`, which ends with this process, however this one ends."""


positive = number("positive number", float, lambda value: 0 < value < math.inf)
count = number("count", int, lambda value: value >= 1)


@dataclass(frozen=True, slots=True)
class Settled:
    """growth: of latency or of the time to the first token, seconds a second; None where requests failed. held: None where the
    time of sending was too short to say."""

    growth: float | None
    held: bool | None


def main(arguments: list[str]) -> int:
    options = checked(parser().parse_args(arguments))
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="keju-serving-") as scratch, Path(scratch, "client.log").open("a") as said:
        servers = [measure(model, options, Path(scratch), said, console) for model in options.models]
    record = {
        "servers": servers,
        "settings": {
            name: getattr(options, name) for name in (*CLIENT_SETTINGS, *(SERVER_SETTINGS if options.url is None else ()))
        },
        "machine": provenance() | {"vllm": vllm_version(), "device": device_name()},
    }
    Console(width=max(140, Console().width)).print(table(record))
    if options.out is not None:
        from benchmarks.serving_plot import draw

        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{options.out}, {draw(options.out)}")
    return 0


def parser() -> Parser:
    commands = Parser(prog="python -m benchmarks.serving", description="A server at rising request rates: the paper's figure 5.")
    add = commands.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="Hugging Face folders, served one after the other")
    add("--url", metavar="URL", help="of a server that runs already; its key in KEJU_API_KEY. MODEL is what it serves")
    add("--rates", default=PAPER_RATES, help=f"requests a second, rising (default: the paper's, {PAPER_RATES})")
    add("--seconds", type=positive, default=120.0, metavar="S", help="of sending at each rate (default: 120)")
    add("--input-tokens", type=count, default=PAPER_INPUT_TOKENS, metavar="N", help="of a prompt (default: the paper's 115)")
    add("--output-tokens", type=count, default=OUTPUT_TOKENS, metavar="N", help="of each output (default: 8000)")
    add("--scale", type=positive, default=1.0, help="multiplies both lengths")
    add("--burstiness", type=positive, default=1.0, help="1: a Poisson process; larger: more evenly spaced")
    add("--dtype", choices=serve.DTYPES, default="bfloat16")
    add("--max-sequences", type=count, default=256, metavar="N", help="decoded at once (rollout.serve)")
    add("--kv-cache-gib", type=positive, metavar="GIB", help="rollout.serve's")
    add("--tensor-parallel", type=count, default=1, metavar="N", help="rollout.serve's")
    add("--threads", type=count, default=1, metavar="N", help="on a CPU: the server's (rollout.serve)")
    add("--start-seconds", type=positive, default=600.0, metavar="S", help="for a server to come up")
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="FILE.json", help="write the figures, and draw them beside it")
    return commands


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """With the rates as numbers and the lengths scaled. Raises InputError for what cannot be measured."""
    options.rates = rates_of(options.rates)
    for rate in options.rates:
        if requests_at(rate, options.seconds) < LEAST_REQUESTS:
            least = math.ceil(LEAST_REQUESTS / options.rates[0])
            raise InputError(
                f"--seconds {options.seconds:g}: sends {requests_at(rate, options.seconds)} requests at {rate:g} a second, and a "
                f"median of fewer than {LEAST_REQUESTS} says nothing; give at least {least}"
            )
    options.input_tokens = max(1, round(options.input_tokens * options.scale))
    options.output_tokens = max(1, round(options.output_tokens * options.scale))
    if options.url is not None and len(options.models) > 1:
        raise InputError(f"--url: one server serves one model, and {len(options.models)} are named; name the one that it serves")
    if options.out is not None and options.out.suffix != ".json":
        raise InputError(f"--out {options.out}: the picture is to lie beside it; name a file that ends in .json")
    if options.out is not None and not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM, whose client this is, is not installed here; run make setup")
    for model in options.models:
        positions = longest_context(read_config(model, "name a Hugging Face folder"))
        tokens = options.input_tokens + options.output_tokens
        if positions and tokens > positions:
            raise InputError(
                f"--output-tokens: {options.input_tokens} + {options.output_tokens} tokens are more than the {positions} "
                f"positions of {model}; give fewer, or a smaller --scale"
            )
        if not (model / "tokenizer.json").exists():
            raise InputError(f"{model}/tokenizer.json: missing; the client writes its prompts with it")
        if options.url is None:
            serve.checked(serve.parser().parse_args(serve_arguments(model, options, free_port())))
    return options


def rates_of(text: str) -> list[float]:
    """'0.5,1,2' → [0.5, 1.0, 2.0]. Raises InputError unless they are positive and rise."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--rates {text!r}: is no list of numbers; write, say, 0.5,1,2") from None
    if not all(0 < rate < math.inf for rate in rates):
        raise InputError(f"--rates {text!r}: a rate is a positive number of requests a second")
    if sorted(set(rates)) != rates:
        raise InputError(f"--rates {text!r}: they must rise; write {','.join(f'{rate:g}' for rate in sorted(set(rates)))}")
    return rates


def requests_at(rate: float, seconds: float) -> int:
    return round(rate * seconds)


# a server


def measure(model: Path, options: argparse.Namespace, scratch: Path, said: TextIO, console: Console) -> dict[str, Any]:
    """Everything about one server. said: where the client's talk goes."""
    log = scratch / f"{model.resolve().name}.log"
    with started(model, options, log, said, console) if options.url is None else contextlib.nullcontext(options.url) as url:
        name = served_name(url)
        rows = []
        for place, rate in enumerate(options.rates):
            requests = requests_at(rate, options.seconds)
            console.print(
                f"{model}: {rate:g} requests/s, {requests} requests over {options.seconds:g} s", highlight=False, soft_wrap=True
            )
            rows.append(row_of(rate, at_rate(model, name, url, rate, requests, options.seed + place, options, said)))
            console.print(f"{model}: {line_of(rows[-1])}", highlight=False, soft_wrap=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {
        "model": str(model),
        "url": options.url,
        "quantization": (config.get("quantization_config") or {}).get("quant_method"),
        "kernels": linear_kernels(log.read_text(errors="replace")) if log.exists() else None,
        "rates": rows,
    }


def serve_arguments(model: Path, options: argparse.Namespace, port: int) -> list[str]:
    """`rollout.serve`'s."""
    positions = longest_context(read_config(model, "name a Hugging Face folder"))
    tokens = options.input_tokens + options.output_tokens + SPARE_TOKENS
    arguments = [str(model), "--load", "--port", str(port), "--dtype", options.dtype, "--threads", str(options.threads)]
    arguments += ["--max-model-len", str(min(tokens, positions or tokens)), "--max-sequences", str(options.max_sequences)]
    arguments += ["--tensor-parallel", str(options.tensor_parallel)]
    return arguments + ([] if options.kv_cache_gib is None else ["--kv-cache-gib", str(options.kv_cache_gib)])


@contextlib.contextmanager
def started(model: Path, options: argparse.Namespace, log: Path, said: TextIO, console: Console) -> Iterator[str]:
    """The address of a server of the model, on loopback and without a key; it ends with the block. Raises EngineError where it
    does not come up."""
    port = free_port()
    console.print(f"{model}: starting a server", highlight=False, soft_wrap=True)
    kept = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(os.getpid()), *serve_arguments(model, options, port)],
            env=kept, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        vllm_client(said)  # seconds of imports, while the server comes up
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + options.start_seconds
        while not healthy(url):
            if process.poll() is not None:
                raise EngineError(f"the server of {model} ended with exit code {process.returncode}: {last_line(log)}")
            if time.monotonic() > deadline:
                raise EngineError(f"the server of {model} is not up after {options.start_seconds:g} s: {last_line(log)}")
            time.sleep(POLL_SECONDS)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def served_name(url: str) -> str:
    """What a server calls its model. Raises InputError where it does not answer."""
    request = urllib.request.Request(f"{url}/v1/models")
    if key := os.environ.get(KEY_VARIABLE):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"][0]["id"]
    except urllib.error.HTTPError as error:
        mend = f"; set {KEY_VARIABLE}" if error.code == 401 else ""
        raise InputError(f"--url {url}: answers /v1/models with {error.code} {error.reason}{mend}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--url {url}: is no vLLM server that answers ({error})") from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"


# a rate


def at_rate(
    model: Path, name: str, url: str, rate: float, requests: int, seed: int, options: argparse.Namespace, said: TextIO
) -> dict[str, Any]:
    """What vLLM's client measured. seed: another at each rate, or the prefix cache would know the prompts."""
    client, commands = vllm_client(said)
    arguments = {
        "--backend": "openai", "--base-url": url, "--endpoint": "/v1/completions", "--model": str(model.resolve()),
        "--served-model-name": name, "--dataset-name": "random", "--random-input-len": options.input_tokens,
        "--random-output-len": options.output_tokens, "--num-prompts": requests, "--request-rate": rate,
        "--burstiness": options.burstiness, "--num-warmups": WARMUPS, "--temperature": 1.0, "--seed": seed,
        "--percentile-metrics": "ttft,tpot,e2el", "--metric-percentiles": 99,
    }  # fmt: skip
    flags = ["--save-detailed", "--ignore-eos", *([] if sys.stderr.isatty() else ["--disable-tqdm"])]
    parsed = commands.parse_args([str(part) for pair in arguments.items() for part in pair] + flags)
    bar = sys.stderr if sys.stderr.isatty() else said
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(bar), client_key(options.url):
        return client.main(parsed)


def vllm_client(said: TextIO) -> tuple[Any, argparse.ArgumentParser]:
    """(vLLM's client, the parser of its command line)."""
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        from vllm.benchmarks import serve as client
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    commands = FlexibleArgumentParser()
    client.add_cli_args(commands)
    return client, commands


@contextlib.contextmanager
def client_key(url: str | None) -> Iterator[None]:
    """The key of a server that was there already, where vLLM's client looks for one: in no argument, so in no log."""
    before = os.environ.get("OPENAI_API_KEY")
    key = os.environ.get(KEY_VARIABLE) if url is not None else None
    os.environ.pop("OPENAI_API_KEY", None)
    if key:
        os.environ["OPENAI_API_KEY"] = key
    try:
        yield
    finally:
        os.environ.pop("OPENAI_API_KEY", None)
        if before is not None:
            os.environ["OPENAI_API_KEY"] = before


def row_of(rate: float, result: dict[str, Any]) -> dict[str, Any]:
    """result: vLLM's client's, detailed. Raises EngineError where no request succeeded."""
    if not result["completed"]:
        why = next(iter(filter(None, result["errors"])), "no answer").strip().splitlines()[-1]
        raise EngineError(f"at {rate:g} requests/s every request failed: {why[:300]}")
    sent = result["start_times"]
    latencies = [math.inf if error else latency for latency, error in zip(result["latencies"], result["errors"], strict=True)]
    return {
        "rate": rate,
        "requests": len(sent),
        "failed": result["failed"],
        "seconds": result["duration"],
        "requests_per_second": result["request_throughput"],
        "output_tokens_per_second": result["output_throughput"],
        "input_tokens": result["total_input_tokens"],
        "output_tokens": result["total_output_tokens"],
        **{
            f"{ours}_ms": {"median": result[f"median_{theirs}_ms"], "p99": result[f"p99_{theirs}_ms"]}
            for ours, theirs in (("ttft", "ttft"), ("tpot", "tpot"), ("latency", "e2el"))
        },
        **asdict(settled(sent, result["ttfts"], latencies)),
    }


def settled(sent: Sequence[float], firsts: Sequence[float], latencies: Sequence[float]) -> Settled:
    """See this module's head. Of at least LEAST_REQUESTS requests, in order: sent: when, in seconds, not all at once; firsts:
    until the first token; latencies: until the last, infinite where one failed, and then the rate was not held."""
    if not np.isfinite(latencies).all():
        return Settled(None, held=False)
    third = (sent[-1] - sent[0]) / 3
    growth = max(_growth(firsts, third), _growth(latencies, third))
    if growth > GROWTH:
        return Settled(growth, held=False)
    return Settled(growth, held=True if np.median(latencies) <= third else None)


def _growth(waited: Sequence[float], third: float) -> float:
    middle, last = np.array_split(np.asarray(waited), 3)[1:]  # by number, not by time: each third has as many
    return float((np.median(last) - np.median(middle)) / third)


# what is said


def line_of(row: dict[str, Any]) -> str:
    held = {
        True: "held",
        False: f"NOT held, {row['failed']} failed"
        if row["failed"]
        else f"NOT held: waiting grew by {row['growth']:.2f} s a second",
        None: "still filling: too short to say whether it is held",
    }[row["held"]]
    return (
        f"{row['output_tokens_per_second']:,.0f} tokens/s, first token after {row['ttft_ms']['median']:,.0f} ms, "
        f"{row['tpot_ms']['median']:.1f} ms a token, {row['latency_ms']['median'] / 1000:.1f} s in all; {held}"
    )


def table(record: dict[str, Any]) -> Table:
    settings = record["settings"]
    title = (
        f"{settings['input_tokens']} + {settings['output_tokens']} tokens, {settings['seconds']:g} s at each rate: median (p99)"
    )
    made = Table(title=title, title_justify="left")
    headings = ("model", "requests/s", "done/s", "tokens/s", "first token, ms", "ms a token", "latency, s", "held", "failed")
    for heading in headings:
        made.add_column(heading, justify="left" if heading == "model" else "right")
    for server in record["servers"]:
        for row in server["rates"]:
            ttft, tpot, latency = row["ttft_ms"], row["tpot_ms"], row["latency_ms"]
            made.add_row(
                Path(server["model"]).name, f"{row['rate']:g}", f"{row['requests_per_second']:.2f}",
                f"{row['output_tokens_per_second']:,.0f}", f"{ttft['median']:,.0f} ({ttft['p99']:,.0f})",
                f"{tpot['median']:.1f} ({tpot['p99']:.1f})", f"{latency['median'] / 1000:.1f} ({latency['p99'] / 1000:.1f})",
                HELD[row["held"]], str(row["failed"]),
            )  # fmt: skip
    return made


if __name__ == "__main__":
    run(main)
