"""Messages between a rank and the process of its engine: whole, in order, and never both ends waiting for each other."""

import socket
import threading

import numpy as np
import pytest

from rollout.vllm.channel import Channel, ChannelClosed

LARGE = np.arange(4 << 20, dtype=np.int32)
"""Far more than a socket holds."""


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    channels = Channel(ours, 5.0), Channel(theirs)
    yield channels
    for channel in channels:
        channel.close()


def test_a_message_arrives_as_it_was_sent(ends):
    here, there = ends
    arrays = {"tokens": np.array([[1, 2], [3, 4]], np.int32), "logprobs": np.zeros(0, np.float32)}
    here.send("samples", arrays=arrays, version=3, reasons=["stop", "长"])
    here.send("progress", tokens=7)
    message = there.receive(5.0)
    assert (message["kind"], message["version"], message["reasons"]) == ("samples", 3, ["stop", "长"])
    np.testing.assert_array_equal(message["tokens"], arrays["tokens"])
    assert (message["logprobs"].dtype, message["logprobs"].size) == (np.float32, 0)
    assert there.receive(5.0) == {"kind": "progress", "tokens": 7}
    assert there.receive(0.01) is None


def test_two_that_send_at_once_do_not_wait_for_each_other(ends):
    """An engine sends samples while its rank sends it another round's prompts."""
    received = {}

    def talk(name, channel):
        for _ in range(3):
            channel.send(name, arrays={"data": LARGE})
        received[name] = [channel.receive(10.0) for _ in range(3)]

    threads = [threading.Thread(target=talk, args=pair, daemon=True) for pair in zip(("rank", "engine"), ends, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "both wait for the other to read"
    for name, other in (("rank", "engine"), ("engine", "rank")):
        assert [message["kind"] for message in received[name]] == [other] * 3
        assert all(np.array_equal(message["data"], LARGE) for message in received[name])


def test_an_end_that_takes_nothing_is_given_up(ends):
    here, _ = ends
    here._patience = 0.2
    with pytest.raises(ChannelClosed, match=r"took nothing for 0\.2 s"):
        here.send("generate", arrays={"data": LARGE})


def test_an_end_that_is_gone_is_said(ends):
    here, there = ends
    there.send("last words")
    there.close()
    assert here.receive(1.0) == {"kind": "last words"}
    with pytest.raises(ChannelClosed):
        here.receive(1.0)
    with pytest.raises(ChannelClosed):
        here.send("anything", arrays={"data": LARGE})
