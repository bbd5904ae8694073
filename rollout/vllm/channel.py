"""Messages over a socket pair: a JSON header and, behind it, raw arrays. Nothing is unpickled.

length of header (u32) · header {"kind": …, fields…, "arrays": [[name, dtype, shape], …]} · bytes of each array
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from typing import Any

import numpy as np

REST_SECONDS = 1.0
"""How long the rest of a message that has begun to come may take, where nobody waits for it."""
Message = dict[str, Any]
"""{"kind": str, …fields, array name: array}."""


class ChannelClosed(ConnectionError):
    """The other end is gone."""


class Channel:
    """One end. Not for two threads at once.

    patience: seconds that the other end may take nothing of what is sent; None: for ever. What comes while something is sent is
    taken in: two ends that send to each other at once, more than a socket holds, would else both wait for ever.
    buffered: `send` never waits; what the socket does not hold goes with later calls of `send` and `receive`. For an end that has
    other work than to wait for the other.
    """

    def __init__(self, connection: socket.socket, patience: float | None = None, *, buffered: bool = False) -> None:
        self._socket, self._patience, self._buffered = connection, patience, buffered
        self._socket.setblocking(False)
        self._received = bytearray()
        self._outgoing = bytearray()

    def send(self, kind: str, *, arrays: dict[str, np.ndarray] | None = None, **fields: Any) -> None:
        """Raises ChannelClosed where the other end is gone, or takes nothing for too long."""
        arrays = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        described = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
        header = json.dumps({"kind": kind, **fields, "arrays": described}).encode()
        # As one piece: a socket's room is counted in pieces too.
        self._outgoing += b"".join([struct.pack("<I", len(header)), header, *(array.tobytes() for array in arrays.values())])
        self._flush()
        while self._outgoing and not self._buffered:
            ready = self._ready(self._patience)
            if not ready:
                raise ChannelClosed(f"the other end took nothing for {self._patience:g} s")
            self._serve(ready)

    def receive(self, seconds: float | None) -> Message | None:
        """The next message; None where none is there within `seconds` (None: waits for ever), but what has begun to come is
        waited for. Raises ChannelClosed at the end."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (message := self._parse()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if left is not None and self._received:
                left = max(left, REST_SECONDS)
            ready = self._ready(left)
            if not ready:
                return None
            self._serve(ready)
        return message

    def close(self) -> None:
        self._socket.close()

    def _ready(self, seconds: float | None) -> int:
        """What can be done within `seconds`, as poll says it; 0 for nothing."""
        if self._socket.fileno() < 0:
            raise ChannelClosed("closed")
        poller = select.poll()  # not select(), which knows only the first 1024 descriptors
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        found = poller.poll(None if seconds is None else 1000 * seconds)
        return found[0][1] if found else 0

    def _serve(self, ready: int) -> None:
        if ready & ~select.POLLOUT:
            self._take()
        if ready & select.POLLOUT:
            self._flush()

    def _flush(self) -> None:
        """Sends what the socket has room for."""
        try:
            while self._outgoing:
                del self._outgoing[: self._socket.send(self._outgoing)]
        except BlockingIOError:
            pass
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def _take(self) -> None:
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed(str(error)) from None
        if not data:
            raise ChannelClosed("end of stream")
        self._received += data

    def _parse(self) -> Message | None:
        """The first message in what was received, taken out of it; None while it is not whole."""
        data = self._received
        if len(data) < 4:
            return None
        end = 4 + struct.unpack_from("<I", data)[0]
        if len(data) < end:
            return None
        message = json.loads(data[4:end])
        described = [(name, np.dtype(kind), tuple(shape)) for name, kind, shape in message.pop("arrays")]
        sizes = [kind.itemsize * int(np.prod(shape, dtype=np.int64)) for _, kind, shape in described]
        if len(data) < end + sum(sizes):
            return None
        for (name, kind, shape), size in zip(described, sizes, strict=True):
            message[name] = np.frombuffer(bytes(data[end : end + size]), dtype=kind).reshape(shape)
            end += size
        del data[:end]
        return message
