"""One chat completion from an OpenAI-compatible service, within a deadline that always holds.

Invariant: `complete` returns or raises ChatFailed by its deadline, whatever the service does: sends
a byte a second, never answers, is not there. The request runs on a thread of its own, whose socket
is shut when it is late. Redirects are not followed, so the key goes to the address in the settings
and nowhere else. What may pass is tried again: no connection, 408, 409, 429, 5xx, an unreadable
body; 400 or 401 never.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

MAX_REPLY_BYTES = 1 << 20
_PASSING = frozenset({408, 409, 429})


class ChatFailed(Exception):
    """No completion could be had. `code` is fit for a verdict's reason."""

    def __init__(self, code: str, passing: bool = True, after_s: float = 0.0) -> None:
        super().__init__(code)
        self.code, self.passing, self.after_s = code, passing, after_s


def complete(
    url: str, body: dict[str, Any], key: str | None, attempt_s: float, deadline: float
) -> str:
    """The text of the first choice; one attempt, ended after `attempt_s` or at `deadline`
    (`time.monotonic`)."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise ChatFailed("timeout")
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = json.dumps(body).encode("ascii")
    status, after, reply = _post(url, headers, data, min(attempt_s, left))
    if status != 200:
        passing = status in _PASSING or status >= 500
        raise ChatFailed(f"http_{status}", passing, after_s=_seconds(after))
    return _content(reply)


def pause(failure: ChatFailed, attempt: int, backoff_s: float, deadline: float) -> None:
    """Wait before the next attempt: twice as long each time, less by chance, or as long as the
    service asks. Raises `failure` where the deadline would pass meanwhile."""
    wait = max(failure.after_s, backoff_s * 2**attempt * random.uniform(0.5, 1.0))
    if time.monotonic() + wait >= deadline:
        raise failure
    time.sleep(wait)


def _content(reply: bytes) -> str:
    try:
        choice = json.loads(reply)["choices"][0]
        text = choice["message"]["content"]
        cut = choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ChatFailed("unreadable") from None
    if cut or not isinstance(text, str):
        raise ChatFailed("cut_off" if cut else "unreadable")
    return text


def _post(
    url: str, headers: dict[str, str], data: bytes, timeout_s: float
) -> tuple[int, str | None, bytes]:
    """Status, Retry-After and body."""
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
            connection.request("POST", path, data, headers)
            response = connection.getresponse()
            body = response.read(MAX_REPLY_BYTES + 1)
            made.put((response.status, response.getheader("Retry-After"), body))
        except Exception as error:
            made.put(error)
        finally:
            connection.close()

    threading.Thread(target=work, name="chat", daemon=True).start()
    try:
        outcome = made.get(timeout=timeout_s)
    except Empty:
        outcome = TimeoutError()
    finally:
        late.set()
        for sock in sockets:  # ends a thread that still reads
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
    if isinstance(outcome, TimeoutError):
        raise ChatFailed("timeout")
    if isinstance(outcome, HTTPException):
        raise ChatFailed("unreadable")
    if isinstance(outcome, OSError):
        raise ChatFailed("unreachable")
    if isinstance(outcome, Exception):
        raise outcome
    if len(outcome[2]) > MAX_REPLY_BYTES:
        raise ChatFailed("unreadable")
    return outcome


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; its other form, a date, counts as none."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
