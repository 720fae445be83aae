"""One POST of JSON, within a deadline that always holds.

Invariant: `post` returns or raises by its time, whatever the service does: sends a byte a second,
never answers, is not there. The request runs on a thread of its own, whose socket is shut when it
is late. Redirects are not followed: what is sent, a key among it, goes to the address given and
nowhere else.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPSConnection
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit


def post(
    url: str, headers: Mapping[str, str], data: bytes, timeout_s: float, most: int
) -> tuple[int, str | None, bytes]:
    """Status, Retry-After and at most `most` + 1 bytes of the body. TimeoutError, OSError,
    HTTPException."""
    address = urlsplit(url)
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    connection = kind(address.hostname or "", address.port, timeout=timeout_s)
    sockets: list[socket.socket] = []
    made: SimpleQueue[Any] = SimpleQueue()
    late = threading.Event()

    def work() -> None:
        try:
            connection.connect()
            sockets.append(connection.sock)
            if late.is_set():
                return
            path = address.path + (f"?{address.query}" if address.query else "")
            fixed = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", path, data, fixed | dict(headers))
            response = connection.getresponse()
            made.put((response.status, response.getheader("Retry-After"), response.read(most + 1)))
        except Exception as error:
            made.put(error)
        finally:
            connection.close()

    threading.Thread(target=work, name="post", daemon=True).start()
    try:
        outcome = made.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    finally:
        late.set()
        for sock in sockets:  # ends a thread that still reads
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
