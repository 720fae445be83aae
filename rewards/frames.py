"""Length-prefixed JSON over a socket: all that passes between a worker and its killable process.

Invariant: what comes back is data (JSON of bounded size), never code; a read or write ends by its
deadline or raises TimeoutError.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

HEADER = struct.Struct(">Q")
CHUNK_BYTES = 1 << 20


def send_frame(channel: socket.socket, value: Any, timeout_s: float | None = None) -> None:
    """Write one value; `timeout_s` bounds the whole write."""
    body = json.dumps(value).encode("ascii")
    channel.settimeout(timeout_s)
    channel.sendall(HEADER.pack(len(body)) + body)


def receive_frame(
    channel: socket.socket, timeout_s: float | None = None, limit_bytes: int | None = None
) -> Any:
    """Read one value. EOFError when the other side is gone, ValueError beyond `limit_bytes`."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    (length,) = HEADER.unpack(_read(channel, HEADER.size, deadline))
    if limit_bytes is not None and length > limit_bytes:
        raise ValueError(f"frame of {length} bytes, at most {limit_bytes} are accepted")
    return json.loads(_read(channel, length, deadline))


def _read(channel: socket.socket, length: int, deadline: float | None) -> bytearray:
    data = bytearray()
    while len(data) < length:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer by the deadline")
            channel.settimeout(left)
        else:
            channel.settimeout(None)
        chunk = channel.recv(min(CHUNK_BYTES, length - len(data)))
        if not chunk:
            raise EOFError("the other side closed the channel")
        data += chunk
    return data
