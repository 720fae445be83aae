"""A process of our own that runs functions under a deadline and is killed from outside when late.

Invariant: `call` returns or raises within its deadline plus the time to kill and start a process,
whatever the function does (loops that hold the GIL, memory, blocked system calls, child
processes); the next call finds a working process. Not thread-safe: one owner, one call at a time.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from rewards.frames import receive_frame, send_frame

START_TIMEOUT_S = 120.0
REPLY_LIMIT_BYTES = 4 << 20
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class DeadlineExceeded(Exception):
    """The function was still running at the deadline; its process has been killed."""


class FunctionFailed(Exception):
    """The function raised; the process lives on."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class ProcessDied(Exception):
    """The process ended before it answered. `by_itself`: not by a signal sent from outside."""

    def __init__(self, returncode: int | None) -> None:
        super().__init__(f"verifier process ended with {returncode}")
        self.by_itself = returncode is not None and -returncode not in FROM_OUTSIDE


class DeadlineWorker:
    """One process, started at the first call and replaced when it is killed or dies."""

    def __init__(self, memory_mib: int) -> None:
        self._memory_bytes = memory_mib << 20
        self._process: subprocess.Popen | None = None
        self._channel: socket.socket | None = None
        self._loaded: set[str] = set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def call(
        self, function: str, arguments: list[Any], timeout_s: float, load: str | None = None
    ) -> Any:
        """`function` ("package.module:name") applied to JSON arguments; its JSON result.

        `load` names a module to import, and whose `warm()` to run if it has one, before the clock
        starts: once a process.
        """
        if self._process is None:
            self._start()
        if load is not None and load not in self._loaded:
            self._load(load)
        return self._exchange(
            {"function": function, "arguments": arguments, "timeout_s": timeout_s}
        )

    def close(self) -> None:
        """Kill the process and everything it started."""
        if self._process is None or self._channel is None:
            return
        for pid in _descendants(self._process.pid):
            _kill(pid)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait(timeout=START_TIMEOUT_S)
        self._channel.close()
        self._process = self._channel = None
        self._loaded.clear()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # BLAS pools eat RLIMIT_AS
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rewards.deadline_child", str(theirs.fileno()),
             str(self._memory_bytes)],
            pass_fds=(theirs.fileno(),),
            env=os.environ | threads | {"PYTHONPATH": path},
            start_new_session=True,  # a group of its own, to be killed as one
        )
        theirs.close()
        self._channel = ours
        try:
            receive_frame(ours, START_TIMEOUT_S, REPLY_LIMIT_BYTES)
        except (EOFError, TimeoutError, OSError) as error:
            self.close()
            raise RuntimeError(
                f"the verifier process did not start within {START_TIMEOUT_S:.0f} s; its errors "
                "are above; is reward.memory_mib large enough (512 or more)?"
            ) from error

    def _load(self, module: str) -> None:
        try:
            self._exchange({"function": None, "load": module, "timeout_s": START_TIMEOUT_S})
        except DeadlineExceeded as error:  # of no item's making: it must not score as one's
            raise FunctionFailed("ImportTimeout", f"{module}: {error}") from None
        self._loaded.add(module)

    def _exchange(self, request: dict[str, Any]) -> Any:
        try:
            send_frame(self._channel, request, request["timeout_s"])
            reply = receive_frame(self._channel, request["timeout_s"], REPLY_LIMIT_BYTES)
        except TimeoutError:
            self.close()
            raise DeadlineExceeded(f"no answer within {request['timeout_s']} s") from None
        except (EOFError, OSError):
            raise ProcessDied(self._returncode()) from None
        except ValueError as error:
            self.close()
            raise FunctionFailed("ReplyTooLarge", str(error)) from None
        except BaseException:  # interrupted between request and reply: the next call must not
            self.close()  # read this one's answer
            raise
        if "error" in reply:
            raise FunctionFailed(reply["error"], reply["message"])
        return reply["value"]

    def _returncode(self) -> int | None:
        """Exit status of a process that closed its channel by itself; then clean up after it."""
        process = self._process
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.close()


def _descendants(pid: int) -> list[int]:
    """Children of every thread of `pid`, theirs, and so on: also those that left its group."""
    found: list[int] = []
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = [int(child) for child in entry.read_text().split()]
        except OSError:  # the thread ended meanwhile
            continue
        for child in children:
            found += [child, *_descendants(child)]
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
