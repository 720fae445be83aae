"""Programs run in jails of one zygote: scripts, function calls, and a prompt's test of a candidate.

Invariant: all the outside takes from a jail is bytes and bounded plain data. A zygote that is lost
is replaced and the program run once more; a second loss raises SandboxLost. Thread-safe by a lock:
one program at a time (a check holds two jails).
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from rewards.sandbox.cgroups import Cgroup, make_cgroup
from rewards.sandbox.codec import decode, encode
from rewards.sandbox.jobs import Job, MalformedReply, Outcome, SandboxLost, read_value
from rewards.sandbox.limits import Limits
from rewards.sandbox.start import START_TIMEOUT_S, start

ZYGOTE_BYTES = 256 << 20
PROGRAMS = 2  # at most so many jails of one zygote at once

T = TypeVar("T")


class Executor(Protocol):
    """Where programs run. Each call returns by `limits.wall_s` and a little more."""

    def script(
        self, source: str, stdin: bytes, limits: Limits, imports: tuple[str, ...] = ()
    ) -> Outcome:
        """A program from standard input to standard output, after the prompt's imports and with
        the names that `usual_names` gives."""
        ...

    def call(
        self, source: str, entry: str, arguments: list[Any], limits: Limits,
        imports: tuple[str, ...] = (),
    ) -> Outcome:
        """`entry(*arguments)`, its value in `Outcome.value`. CodecError for too large arguments."""
        ...

    def check(self, source: str, test: dict[str, str], limits: Limits) -> tuple[str, str]:
        """State (passed, failed, timeout, unsupported) and reason of a prompt's own test:
        `helpers`, `test` and `entry_point`."""
        ...

    def close(self) -> None: ...


class JailExecutor:
    """A zygote of our own. `jailed` False: the same without walls."""

    def __init__(self, jailed: bool = True, largest: Limits | None = None) -> None:
        """`largest`: limits that no program's will exceed; the control group's follow from it."""
        self._jailed = jailed
        self._limits = largest or Limits()
        self._lock = threading.Lock()
        self._cgroup: Cgroup | None = None
        self._num_replaced = 0
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that left the host."""
        return self._process.pid

    @property
    def cgroup(self) -> Cgroup | None:
        return self._cgroup

    def script(
        self, source: str, stdin: bytes, limits: Limits, imports: tuple[str, ...] = ()
    ) -> Outcome:
        payload = {"mode": "script", "source": source, "imports": imports}
        return self._twice(lambda: self._outcome(payload, stdin, limits))

    def call(
        self, source: str, entry: str, arguments: list[Any], limits: Limits,
        imports: tuple[str, ...] = (),
    ) -> Outcome:
        payload = {"mode": "serve", "source": source, "entry_point": entry, "imports": imports}
        request = encode(("call", tuple(arguments), {}))
        return self._twice(lambda: self._value(payload, request, limits))

    def check(self, source: str, test: dict[str, str], limits: Limits) -> tuple[str, str]:
        candidate = {"mode": "serve", "source": source, "entry_point": test["entry_point"]}
        return self._twice(lambda: self._checked(candidate, {"mode": "check", **test}, limits))

    def take_replaced(self) -> int:
        """Zygotes lost and replaced since the last call."""
        with self._lock:
            number, self._num_replaced = self._num_replaced, 0
        return number

    def close(self) -> None:
        """End the zygote and every program; idempotent."""
        self._socket.close()
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(START_TIMEOUT_S)
        if self._process.stderr is not None:
            self._process.stderr.close()
        if self._cgroup is not None:
            self._cgroup.close()

    def _start(self) -> None:
        limits = self._limits
        if self._jailed:
            self._cgroup = make_cgroup(
                ZYGOTE_BYTES + PROGRAMS * (limits.memory_bytes + limits.file_bytes),
                8 + PROGRAMS * (limits.processes + 4),
            )
        self._process, self._socket = start(self._jailed, self._cgroup)

    def _twice(self, attempt: Callable[[], T]) -> T:
        with self._lock:
            try:
                return attempt()
            except SandboxLost:
                self._num_replaced += 1
                self.close()
                self._start()
                return attempt()

    def _job(self, payload: dict[str, Any], stdin: bytes, limits: Limits) -> Job:
        return Job(self._socket, payload, stdin, limits)

    def _outcome(self, payload: dict[str, Any], stdin: bytes, limits: Limits) -> Outcome:
        with self._job(payload, stdin, limits) as job:
            return job.outcome()

    def _value(self, payload: dict[str, Any], request: bytes, limits: Limits) -> Outcome:
        with self._job(payload, b"", limits) as job:
            outcome = _called(job, request)
        if job.cpu_s >= limits.cpu_s:
            return Outcome("timeout", cpu_s=job.cpu_s)
        return replace(outcome, cpu_s=job.cpu_s)

    def _checked(
        self, candidate: dict[str, Any], test: dict[str, Any], limits: Limits
    ) -> tuple[str, str]:
        with self._job(candidate, b"", limits) as hostile, self._job(test, b"", limits) as judge:
            try:
                return _relay(judge, hostile)
            except TimeoutError:
                return "timeout", ""
            except EOFError:
                ended = judge.outcome()
                return ("timeout", "") if ended.state == "timeout" else ("failed", ended.state)


def _called(job: Job, request: bytes) -> Outcome:
    try:
        reply = read_value(job.ask(request, job.deadline))
    except TimeoutError:
        return Outcome("timeout")
    except MalformedReply:
        return Outcome("runtime_error")
    except EOFError:
        ended = job.outcome()
        return ended if ended.state != "finished" else Outcome("runtime_error")
    if reply[0] == "error":
        return Outcome("memory" if reply[1] == "MemoryError" else "runtime_error")
    return Outcome("finished", value=reply[1])


def _relay(judge: Job, hostile: Job) -> tuple[str, str]:
    """Pass the test's calls on to the candidate until the test has ended.

    Only the judge's messages decide; the candidate's are checked to be a value or an error and
    passed on as they came.
    """
    while True:
        request = judge.receive(judge.deadline)
        message = decode(request)
        if message[0] == "done":
            return message[1], message[2]
        try:
            reply = hostile.ask(request, hostile.deadline)
            read_value(reply)
        except MalformedReply:
            return "failed", "malformed_reply"
        except EOFError:
            ended = hostile.outcome()
            return ("timeout", "") if ended.state == "timeout" else ("failed", ended.state)
        judge.send(reply, judge.deadline)
