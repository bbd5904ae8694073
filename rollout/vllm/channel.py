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

Message = dict[str, Any]
"""{"kind": str, …fields, array name: array}."""


class ChannelClosed(ConnectionError):
    """The other end is gone."""


class Channel:
    """One end. Not for two threads at once."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._received = bytearray()

    def send(self, kind: str, *, arrays: dict[str, np.ndarray] | None = None, **fields: Any) -> None:
        """Raises ChannelClosed where the other end is gone."""
        arrays = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        described = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
        header = json.dumps({"kind": kind, **fields, "arrays": described}).encode()
        try:
            self._socket.sendall(struct.pack("<I", len(header)) + header)
            for array in arrays.values():
                self._socket.sendall(memoryview(array).cast("B") if array.size else b"")
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self, seconds: float | None) -> Message | None:
        """The next message; None where none is complete within `seconds` (None: waits for ever). Raises ChannelClosed at the
        end."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while (message := self._parse()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._socket], [], [], left)
            if not ready:
                return None
            try:
                data = self._socket.recv(1 << 20)
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if not data:
                raise ChannelClosed("end of stream")
            self._received += data
        return message

    def close(self) -> None:
        self._socket.close()

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
