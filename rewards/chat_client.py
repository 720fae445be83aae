"""One chat completion from an OpenAI-compatible service, within a deadline that always holds.

Invariant: `complete` returns or raises ChatFailed by its deadline, whatever the service does (see
`http_post`). What may pass is tried again: no connection, 408, 409, 429, 5xx, an unreadable body;
400 or 401 never.
"""

from __future__ import annotations

import json
import random
import time
from http.client import HTTPException
from typing import Any

from rewards.http_post import post

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
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    data = json.dumps(body).encode("ascii")
    try:
        status, after, reply = post(url, headers, data, min(attempt_s, left), MAX_REPLY_BYTES)
    except TimeoutError:
        raise ChatFailed("timeout") from None
    except OSError:
        raise ChatFailed("unreachable") from None
    except HTTPException:
        raise ChatFailed("unreadable") from None
    if len(reply) > MAX_REPLY_BYTES:
        raise ChatFailed("unreadable")
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


def _seconds(header: str | None) -> float:
    """Retry-After in seconds; its other form, a date, counts as none."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
