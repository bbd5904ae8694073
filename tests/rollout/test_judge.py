"""The judge against a scripted endpoint: every fault ends within its deadline, as a verdict or as `unjudged` and never as right
or wrong; what is asked, what it costs and what is kept; nothing is left behind.

What a scripted endpoint cannot show is what a model makes of the request: test_judge_request.py shows what the request is.
"""

import json
import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from rollout.errors import InputError
from rollout.reward.format import Response
from rollout.reward.judge.endpoint import retry_after
from rollout.reward.judge.settings import JudgeSettings
from rollout.reward.judge.verifier import Counts, JudgeVerifier, check_endpoint
from rollout.types import Prompt
from tests.rollout.fake_servers import free_port
from tests.rollout.judge_endpoint import block, by_material, completion, judged, scripted_judge

PROMPT = Prompt("q", "Say something about 2.", "2 is even", metadata={"judge": True})
KEY = "sk-correct-horse"


def settings_of(endpoint, **changes):
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    fast = {"timeout_seconds": 1.0, "deadline_seconds": 20.0, "tries": 3, "api_key_env": "KEJU_TEST_JUDGE_KEY"}
    return JudgeSettings(url, "the-judge", **(fast | changes))


def pairs_of(*answers, thinking="Two halves."):
    return [(PROMPT, Response(thinking, answer)) for answer in answers]


def numbered(count, end="right"):
    return pairs_of(*(f"{number} {end}" for number in range(count)))


def verdicts_of(endpoint, pairs, **changes):
    """(verdicts, seconds, counts), after a check that nothing is left behind."""
    before = open_descriptors()
    with JudgeVerifier(settings_of(endpoint, **changes)) as judge:
        start = time.monotonic()
        verdicts = judge.verify(pairs)
        seconds = time.monotonic() - start
        counts = judge.measured()
    assert not [thread for thread in threading.enumerate() if thread.name == "keju-judge-endpoint"]
    if not isinstance(endpoint, str):
        endpoint.wait_until(lambda endpoint: endpoint.at_once == 0)
        deadline = time.monotonic() + 10
        while open_descriptors() > before and time.monotonic() < deadline:  # the endpoint's own ends close after ours
            time.sleep(0.02)
    assert open_descriptors() <= before, "a socket or a loop stayed open"
    return verdicts, seconds, counts


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module", autouse=True)
def client_is_loaded():
    """Its import opens what stays open."""
    with scripted_judge() as endpoint, JudgeVerifier(settings_of(endpoint)) as judge:
        judge.verify(numbered(1))


@pytest.fixture
def endpoint():
    with scripted_judge() as judge:
        yield judge


def reasons(verdicts):
    return [verdict.reason for verdict in verdicts]


# Verdicts


def test_each_verdict_stands_where_its_response_stood(endpoint):
    endpoint.script = deque([lambda body: (time.sleep(0.05), by_material(body))[1]] * 2)
    verdicts, _, counts = verdicts_of(endpoint, pairs_of("a right", "b wrong", "c process", "d right"))
    assert reasons(verdicts) == ["right", "wrong", "process", "right"]
    assert [verdict.reward for verdict in verdicts] == [1, -1, -1, 1]
    assert verdicts[1].detail == "judge: scripted"
    assert counts == Counts(decided=4, requests=4, tokens=400)


def test_the_process_may_be_shown_and_not_counted_or_not_be_asked_for(endpoint):
    verdicts, _, _ = verdicts_of(endpoint, pairs_of("c process"), process_counts=False)
    assert (verdicts[0].right, verdicts[0].reason) == (True, "right")
    assert verdicts[0].detail.startswith("process wrong; ")
    assert block(endpoint.requests[0], "THINKING") == "Two halves."
    verdicts, _, _ = verdicts_of(endpoint, pairs_of("c process"), process="off")
    assert reasons(verdicts) == ["right"]
    asked = endpoint.requests[1]
    assert "process" not in asked["response_format"]["json_schema"]["schema"]["properties"]
    assert "Two halves." not in json.dumps(asked)
    verdicts, _, _ = verdicts_of(endpoint, pairs_of("c process"), process="answer")
    assert reasons(verdicts) == ["process"]
    assert "Two halves." not in json.dumps(endpoint.requests[2])


def test_every_part_must_be_right(endpoint):
    prompt = Prompt("q", "(1) a? (2) b? (3) c?", "(1) 1 (2) 2 (3) 3")
    endpoint.script = deque([lambda body: judged(body, False, parts={"1": True, "2": False, "3": True})])
    endpoint.otherwise = lambda body: judged(body, True)
    (wrong, right), _, _ = verdicts_of(endpoint, [(prompt, Response("t", "x")), (prompt, Response("t", "y"))], concurrency=1)
    assert (wrong.reason, right.reason) == ("wrong", "right")
    assert wrong.detail.startswith("part 2 wrong")


def test_what_is_asked_as_the_endpoint_sees_it(endpoint):
    verdicts_of(endpoint, numbered(1), extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    (body,), (headers,) = endpoint.requests, endpoint.headers
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("the-judge", 0.0, 1024)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["response_format"]["json_schema"]["strict"] is True
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    verdicts_of(endpoint, numbered(1), temperature=None, max_tokens=None, reason_chars=None)
    body = endpoint.requests[1]
    assert not {"temperature", "max_tokens"} & set(body)
    assert "maxLength" not in json.dumps(body)
    assert headers["Host"].startswith("127.0.0.1")


def test_answers_that_need_no_judge(endpoint):
    verdicts, _, counts = verdicts_of(endpoint, pairs_of("x" * 8001, "\u200b\u2060", "x" * 8000))
    assert reasons(verdicts) == ["wrong", "wrong", "wrong"]
    assert "8001 characters" in verdicts[0].detail
    assert counts.requests == 1


# Faults


@pytest.mark.parametrize(
    "fault",
    [
        429, 500, 503, 408, (429, {"Retry-After": "0.2"}), "cut", "silent", "drip", "garbage", "html", b"[]", b"null", b"{}",
        "", "right", "{}", '{"final": true}', "null", "[true]", {"choices": []}, {"choices": None}, {"error": "busy"},
        completion(None), completion({"final": True}), completion("{}", finish_reason="length"), {"choices": [{}]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_fault_once_is_asked_again_and_always_is_unjudged(fault):
    with scripted_judge(script=deque([fault])) as endpoint:
        verdicts, seconds, counts = verdicts_of(endpoint, numbered(1))
        assert reasons(verdicts) == ["right"]
        assert (counts.requests, counts.retries, counts.decided) == (2, 1, 1)
        assert seconds < 4
    with scripted_judge(otherwise=fault) as endpoint:
        verdicts, seconds, counts = verdicts_of(endpoint, numbered(2))
        assert reasons(verdicts) == ["unjudged"] * 2
        assert all(verdict.detail.endswith("after 3 tries") for verdict in verdicts), verdicts
        assert "\n" not in verdicts[0].detail
        assert (counts.requests, counts.unjudged) == (6, 2)
        assert seconds < 8


def wrong_types(body):
    return judged(body, True, final="true")


def contradiction(body):
    return judged(body, False, final=True)


def other_contradiction(body):
    return judged(body, True, final=False)


def too_few_parts(body):
    return judged(body, True, parts={})


def too_many_parts(body):
    return judged(body, True, parts={"1": True, "2": True})


def one_as_true(body):
    return judged(body, True, parts={"1": 1})


def extra_key(body):
    return judged(body, True, overall=True)


def fenced(body):
    return f"```json\n{judged(body, True)}\n```"


def twice(body):
    return '{"final": false, ' + judged(body, True)[1:]


def followed(body):
    return judged(body, True) + judged(body, True)


@pytest.mark.parametrize(
    "reply",
    [
        wrong_types, contradiction, other_contradiction, too_few_parts, too_many_parts, one_as_true, extra_key, fenced, twice,
        followed,
    ],
    ids=lambda reply: reply.__name__,
)  # fmt: skip
def test_a_reply_that_is_no_verdict_is_never_read_as_one(reply):
    with scripted_judge(otherwise=reply) as endpoint:
        verdicts, _, counts = verdicts_of(endpoint, numbered(1), tries=2)
    assert reasons(verdicts) == ["unjudged"]
    assert counts.requests == 2
    assert "the judge's reply is" in verdicts[0].detail


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_refused_is_not_asked_again_and_the_others_are_asked(status):
    with scripted_judge(otherwise=lambda body: status if "0 right" in block(body) else "judge") as endpoint:
        verdicts, _, counts = verdicts_of(endpoint, numbered(4), concurrency=1)
    assert reasons(verdicts) == ["unjudged", "right", "right", "right"]
    assert counts.requests == 4
    assert f"HTTP {status}" in verdicts[0].detail


@pytest.mark.parametrize("status", [401, 403, 404, (307, {"Location": "/elsewhere"})])
def test_what_means_every_case_ends_the_batch(status):
    with scripted_judge(otherwise=status) as endpoint:
        verdicts, seconds, counts = verdicts_of(endpoint, numbered(50), concurrency=2)
    assert reasons(verdicts) == ["unjudged"] * 50
    assert counts.requests <= 2
    assert seconds < 2


def test_a_refused_connection():
    verdicts, seconds, counts = verdicts_of(f"http://127.0.0.1:{free_port()}/v1", numbered(20))
    assert reasons(verdicts) == ["unjudged"] * 20
    assert counts.requests == 60
    assert "onnect" in verdicts[0].detail
    assert seconds < 4


def test_the_deadline_holds_for_the_whole_batch():
    with scripted_judge(otherwise="silent") as endpoint:
        endpoint.script = deque(["judge", "judge"])
        verdicts, seconds, _ = verdicts_of(
            endpoint, numbered(40), concurrency=2, timeout_seconds=60, deadline_seconds=1.5, tries=5
        )
    assert 1.4 < seconds < 2.5
    assert reasons(verdicts).count("right") == 2, "what was decided before the deadline stays"
    assert reasons(verdicts).count("unjudged") == 38
    assert {verdict.detail for verdict in verdicts if not verdict.judged} == {"no verdict within 1.5 s"}


def test_a_reply_that_trickles_ends_with_its_own_time_out():
    with scripted_judge(otherwise="drip") as endpoint:
        verdicts, seconds, _ = verdicts_of(endpoint, numbered(1), timeout_seconds=0.5, tries=2)
    assert verdicts[0].detail == "no reply within 0.5 s, after 2 tries"
    assert 1.0 < seconds < 2.5


def test_retry_after_is_kept_by_all_requests():
    with scripted_judge(script=deque([(429, {"Retry-After": "1.2"})])) as endpoint:
        verdicts, seconds, _ = verdicts_of(endpoint, numbered(6), concurrency=1)
        assert reasons(verdicts) == ["right"] * 6
        first, *later = endpoint.times
        assert min(later) - first >= 1.15, "a request came in the pause that the endpoint asked for"
        assert seconds < 5


def test_a_pause_beyond_the_deadline_is_not_waited_for():
    with scripted_judge(otherwise=(503, {"Retry-After": "3600"})) as endpoint:
        verdicts, seconds, counts = verdicts_of(endpoint, numbered(9), concurrency=1)
    assert reasons(verdicts) == ["unjudged"] * 9
    assert seconds < 2
    assert counts.requests == 1, "it asked to be left alone"
    assert any("after the deadline" in verdict.detail for verdict in verdicts)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("3", 3), ("0.25", 0.25), ("-1", None), ("0", None), ("nan", None), ("inf", None), ("soon", None), ("", None)],
)
def test_retry_after_by_hand(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_as_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 27 < retry_after(later) <= 30
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") is None


def test_an_endpoint_that_dies_in_a_batch_and_comes_back():
    with scripted_judge(delay=0.05) as endpoint, JudgeVerifier(settings_of(endpoint, concurrency=2, tries=8)) as judge:
        pending = judge.start(numbered(30))
        endpoint.wait_until(lambda endpoint: len(endpoint.requests) >= 6)
        endpoint.stop()
        time.sleep(0.7)
        endpoint.start()
        start = time.monotonic()
        assert reasons(pending.result()) == ["right"] * 30
        assert time.monotonic() - start < 15
        assert judge.measured().retries > 0


def test_a_silent_endpoint_is_tried_with_one_request_a_batch_and_heard_when_it_is_back():
    notes = []
    with scripted_judge(otherwise=500) as endpoint, JudgeVerifier(settings_of(endpoint, tries=2), note=notes.append) as judge:
        assert reasons(judge.verify(numbered(5))) == ["unjudged"] * 5
        assert len(endpoint.requests) == 10
        for _ in range(2):
            verdicts = judge.verify(numbered(5))
            assert reasons(verdicts) == ["unjudged"] * 5
            assert "has been silent" in verdicts[-1].detail
        assert len(endpoint.requests) == 12
        endpoint.otherwise = "judge"
        assert reasons(judge.verify(numbered(5))) == ["right"] * 5
        assert judge.measured().unjudged == 15
    assert len(notes) == 2, notes
    assert notes[0].startswith("judge: the endpoint is silent, 5 samples have no verdict: HTTP 500")
    assert notes[1] == "judge: the endpoint answers again"


@pytest.mark.parametrize(
    "fault",
    [400, contradiction, completion("{}", finish_reason="length")],
    ids=["400", "contradiction", "cut off"],
)
def test_a_case_without_a_verdict_is_no_silent_endpoint(fault):
    notes = []
    with scripted_judge(otherwise=fault) as endpoint, JudgeVerifier(settings_of(endpoint), note=notes.append) as judge:
        assert reasons(judge.verify(numbered(1))) == ["unjudged"]
        endpoint.script, endpoint.otherwise = deque([fault]), "judge"
        verdicts = judge.verify(numbered(6))
        assert reasons(verdicts).count("right") >= 5, "one bad reply must not take the others with it"
    assert not notes


def test_a_probe_that_is_heard_without_a_verdict_is_asked_again():
    with scripted_judge(otherwise=500) as endpoint, JudgeVerifier(settings_of(endpoint, tries=2)) as judge:
        assert reasons(judge.verify(numbered(2))) == ["unjudged"] * 2
        endpoint.script, endpoint.otherwise = deque([contradiction]), "judge"
        assert reasons(judge.verify(numbered(4))) == ["right"] * 4
        assert judge.measured() == Counts(decided=4, unjudged=2, requests=4 + 5, tokens=500, retries=2)


def test_no_more_requests_at_once_than_allowed():
    with scripted_judge(delay=0.05) as endpoint:
        _, seconds, _ = verdicts_of(endpoint, numbered(24), concurrency=6)
        assert endpoint.most_at_once == 6
        assert seconds < 1.5


def test_closing_calls_off_what_is_under_way():
    with scripted_judge(otherwise="silent") as endpoint:
        judge = JudgeVerifier(settings_of(endpoint, timeout_seconds=60, deadline_seconds=60))
        pending = judge.start(numbered(3))
        endpoint.wait_until(lambda endpoint: endpoint.at_once == 3)
        start = time.monotonic()
        judge.close()
        assert reasons(pending.result()) == ["unjudged"] * 3
        assert time.monotonic() - start < 3
        endpoint.wait_until(lambda endpoint: endpoint.at_once == 0)
        judge.close()


def test_a_cut_reply_says_so():
    with scripted_judge(otherwise=completion(judged_whole(), finish_reason="length")) as endpoint:
        verdicts, _, _ = verdicts_of(endpoint, numbered(1), tries=1, max_tokens=77)
    assert verdicts[0].detail == "the judge's reply was cut at 77 tokens (max_tokens)"


def judged_whole():
    return json.dumps({"reason": "", "parts": {"1": True}, "final": True, "process": True})


# Cache and budget


def test_equal_cases_are_asked_once_and_decisions_are_kept(endpoint, tmp_path):
    store = tmp_path / "judge" / "rank-0.sqlite"
    pairs = pairs_of("a right", "b wrong", "a right", "c process")
    with JudgeVerifier(settings_of(endpoint), store=store) as judge:
        first = judge.verify(pairs)
        assert len(endpoint.requests) == 3
        assert judge.verify(pairs) == first
        assert judge.measured() == Counts(decided=3, found=3, requests=3, tokens=300)
    with JudgeVerifier(settings_of(endpoint), store=store) as judge:
        assert judge.verify(pairs) == first
        assert len(endpoint.requests) == 3, "decisions survive a restart"
    with JudgeVerifier(settings_of(endpoint, process_counts=False), store=store) as judge:
        assert reasons(judge.verify(pairs)) == ["right", "wrong", "right", "right"], (
            "what is kept is the decision, not the verdict"
        )
        assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"temperature": 0.5}},
        {"settings": {"process": "answer"}},
        {"settings": {"extra_body": {"top_k": 1}}},
        {"settings": {"max_tokens": 99}},
        {"prompt": Prompt("q", "Another question about 2.", "2 is even")},
        {"prompt": Prompt("q", "Say something about 2.", "2 is odd")},
        {"response": Response("Three halves.", "a right")},
        {"response": Response("Two halves.", "b right")},
        {"model": "another"},
    ],
    ids=repr,
)
def test_whatever_a_verdict_depends_on_belongs_to_its_key(endpoint, tmp_path, change):
    pair = (PROMPT, Response("Two halves.", "a right"))
    with JudgeVerifier(settings_of(endpoint), store=tmp_path / "store") as judge:
        judge.verify([pair])
    settings = settings_of(endpoint, **change.get("settings", {}))
    if "model" in change:
        settings = JudgeSettings(settings.base_url, change["model"], timeout_seconds=1.0)
    with JudgeVerifier(settings, store=tmp_path / "store") as judge:
        judge.verify([(change.get("prompt", pair[0]), change.get("response", pair[1]))])
    assert len(endpoint.requests) == 2


def test_what_is_unjudged_is_not_kept(endpoint, tmp_path):
    endpoint.otherwise = 500
    with JudgeVerifier(settings_of(endpoint, tries=1), store=tmp_path / "store") as judge:
        assert reasons(judge.verify(numbered(2))) == ["unjudged"] * 2
        endpoint.otherwise = "judge"
        assert reasons(judge.verify(numbered(2))) == ["right"] * 2


def test_a_budget_of_requests_is_never_passed_and_is_said_once(endpoint, tmp_path):
    notes = []
    settings = settings_of(endpoint, budget_requests=7, concurrency=3)
    with JudgeVerifier(settings, store=tmp_path / "store", note=notes.append) as judge:
        verdicts = judge.verify(numbered(10))
        assert reasons(verdicts).count("right") == 7, "what was asked within the budget is kept"
        assert reasons(verdicts).count("unjudged") == 3
        assert {verdict.detail for verdict in verdicts if not verdict.judged} == {"the budget of 7 requests is spent"}
        assert judge.verify(numbered(10)) == verdicts, "what is known costs nothing"
        assert reasons(judge.verify(pairs_of("new right"))) == ["unjudged"]
    with JudgeVerifier(settings, store=tmp_path / "store", note=notes.append) as judge:
        assert reasons(judge.verify(pairs_of("new right"))) == ["unjudged"], "a restart is no new budget"
    assert len(endpoint.requests) == 7
    assert [note for note in notes if "spent" in note] == notes
    assert len(notes) == 2, "once a start"


def test_failed_requests_cost_too():
    with scripted_judge(otherwise=500) as endpoint:
        _, _, counts = verdicts_of(endpoint, numbered(5), budget_requests=4, tries=9)
    assert counts.requests == 4


def test_a_budget_of_tokens(endpoint):
    verdicts, _, counts = verdicts_of(endpoint, numbered(10), budget_tokens=450, concurrency=1)
    assert (reasons(verdicts).count("right"), counts.tokens) == (5, 500)


def test_the_ranks_share_the_budget(endpoint):
    total = 0
    for rank in range(3):
        with JudgeVerifier(settings_of(endpoint, budget_requests=8), rank=rank, ranks=3) as judge:
            judge.verify(pairs_of(*(f"{rank} {number} right" for number in range(9))))
            total += judge.measured().requests
    assert total == len(endpoint.requests) == 8


def test_a_store_that_is_none(endpoint, tmp_path):
    (tmp_path / "store").write_bytes(b"no database, whatever it is, " * 100)
    with pytest.raises(InputError, match="store: no store of a judge's decisions"):
        JudgeVerifier(settings_of(endpoint), store=tmp_path / "store")
    assert not [thread for thread in threading.enumerate() if thread.name == "keju-judge-endpoint"]


# The key


def test_the_key_is_sent_from_the_named_variable_alone_and_never_shown(endpoint, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-account")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-another-admin")
    monkeypatch.setenv("OPENAI_ORG_ID", "another-organization")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "another-project")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert reasons(verdicts_of(endpoint, numbered(1))[0]) == ["right"]
    monkeypatch.setenv("KEJU_TEST_JUDGE_KEY", KEY)
    assert reasons(verdicts_of(endpoint, numbered(1))[0]) == ["right"]
    keyless, keyed = endpoint.headers
    assert keyed["Authorization"] == f"Bearer {KEY}"
    assert "another" not in json.dumps([keyless, keyed])
    endpoint.key = KEY + "x"
    verdicts, _, _ = verdicts_of(endpoint, numbered(1))
    assert verdicts[0].reason == "unjudged"
    assert "Incorrect API key" in verdicts[0].detail
    assert KEY not in verdicts[0].detail, "the endpoint echoes it"
    assert KEY not in caplog.text
    assert KEY not in "".join(capfd.readouterr())
    assert KEY not in repr(settings_of(endpoint))


def test_a_redirect_is_not_followed(endpoint, monkeypatch):
    monkeypatch.setenv("KEJU_TEST_JUDGE_KEY", KEY)
    with scripted_judge(otherwise=(307, {"Location": f"{endpoint.url}/chat/completions"})) as redirecting:
        verdicts, _, _ = verdicts_of(redirecting, numbered(1))
    assert verdicts[0].reason == "unjudged"
    assert "HTTP 307" in verdicts[0].detail
    assert not endpoint.requests


@pytest.mark.parametrize(
    ("url", "key", "why"),
    [
        ("127.0.0.1:8000", "", "is not a base address"),
        ("http://a b/v1", "", "is not a base address"),
        ("http://me:secret@127.0.0.1/v1", "", "holds a name or password"),
        ("https://judge.example/v1", "", "is empty, and judge.example is not this host"),
        ("http://127.0.0.1.example/v1", "", "is not this host"),
        ("http://127.0.0.1:8000/v1", "k y", "other than printable ASCII"),
        ("http://127.0.0.1:8000/v1", "schlüssel", "other than printable ASCII"),
    ],
)
def test_addresses_and_keys_that_cannot_be_used(monkeypatch, url, key, why):
    monkeypatch.setenv("KEJU_TEST_JUDGE_KEY", key)
    with pytest.raises(InputError) as raised:
        JudgeVerifier(settings_of(url))
    assert why in str(raised.value)
    assert not key or key not in str(raised.value)


# Before a run


def test_the_check_before_a_run(endpoint):
    check_endpoint(settings_of(endpoint))
    assert endpoint.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["parts"]["required"] == ["1", "2"]
    endpoint.otherwise = 400
    with pytest.raises(InputError, match=r"reward.judge.base_url: .*: no verdict from the-judge: HTTP 400: .*reason_chars"):
        check_endpoint(settings_of(endpoint))
    endpoint.otherwise = "silent"
    start = time.monotonic()
    with pytest.raises(InputError, match="no verdict within 1 s"):
        check_endpoint(settings_of(endpoint, timeout_seconds=0.5))
    assert time.monotonic() - start < 3


def test_a_damaged_store_costs_requests_and_not_the_run(endpoint, tmp_path):
    store, notes, pairs = tmp_path / "store", [], numbered(300)
    with JudgeVerifier(settings_of(endpoint), store=store) as judge:
        first = judge.verify(pairs)
    content = bytearray(store.read_bytes())
    pages = len(content) // 4096
    assert pages > 4
    content[4096 * (pages - 3) :] = bytes(4096 * 3)
    store.write_bytes(content)
    before = len(endpoint.requests)
    with JudgeVerifier(settings_of(endpoint), store=store, note=notes.append) as judge:
        assert judge.verify(pairs) == first
        again = len(endpoint.requests)
        assert again > before, "some were lost"
        assert judge.verify(pairs) == first
        assert len(endpoint.requests) == again, "what cannot be kept there is kept in memory"
    (note,) = notes
    assert note.startswith(f"judge: {store}: ")
    assert "malformed" in note
    assert "decisions are kept in memory; free space there, or if it is damaged remove it before the next start" in note


def test_a_store_on_a_full_disk_costs_no_verdict(endpoint, tmp_path, monkeypatch):
    notes = []
    with JudgeVerifier(settings_of(endpoint), store=tmp_path / "store", note=notes.append) as judge:
        judge._run(capped(judge._store))
        verdicts = judge.verify(numbered(200))
        assert reasons(verdicts) == ["right"] * 200
        assert judge.verify(numbered(200)) == verdicts
        assert len(endpoint.requests) == 200
    assert ["full" in note for note in notes] == [True]


async def capped(store):
    """A file that must not grow any more is SQLite's full disk."""
    (pages,) = store._base.execute("PRAGMA page_count").fetchone()
    store._base.execute(f"PRAGMA max_page_count = {pages}")
