"""The killable process: runs one named function at a time and sends back its result.

Invariant: it needs no cooperation to die. The parent kills it from outside at the deadline; were
the parent gone, the kernel's timer ends it. Memory is bounded by RLIMIT_AS; standard output is not
the channel, so a function that prints breaks nothing. Started by `DeadlineWorker` alone.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import signal
import socket
import sys
from typing import Any

from rewards.frames import receive_frame, send_frame

PR_SET_CHILD_SUBREAPER = 36
ORPHAN_GRACE_S = 2.0


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    _limit(memory_bytes=int(sys.argv[2]))
    send_frame(channel, {"ready": os.getpid()})
    while True:
        try:
            request = receive_frame(channel)
        except EOFError:
            return
        except MemoryError:  # the request alone is too large; the rest of it is still in the pipe
            os._exit(1)
        reply = _answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _reap()
        send_frame(channel, reply)


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Daemonised grandchildren become children of ours, where the parent's kill finds them.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    # SIGALRM keeps its default action: the kernel ends us even inside a C loop that holds the GIL.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout_s"] + ORPHAN_GRACE_S)
    try:
        if request["function"] is None:
            return {"value": _load(request["load"])}
        module, _, name = request["function"].partition(":")
        return {"value": getattr(importlib.import_module(module), name)(*request["arguments"])}
    except BaseException as error:  # SystemExit too: whatever it is, it is an answer
        return {"error": type(error).__name__, "message": _message(error)}


def _load(module: str) -> None:
    warm = getattr(importlib.import_module(module), "warm", None)
    if warm is not None:
        warm()


def _message(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:  # an exception whose __str__ raises is still an exception
        return ""


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
