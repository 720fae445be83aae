"""The outside of one jailed program: files handed in, output taken out, a deadline kept.

Invariant: a job ends by its deadline whatever the program does; when the `with` block is left,
every process of the program is gone. Output beyond the limit ends the program instead of filling
our memory. A program that the sandbox failed to run raises SandboxLost; it is never taken for a
wrong one.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import selectors
import signal
import socket
import time
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

from rewards.sandbox.codec import MESSAGE_BYTES, CodecError, decode
from rewards.sandbox.jail import REPORT
from rewards.sandbox.limits import ERROR_BYTES, Limits
from rewards.sandbox.program import FRAME

END_TIMEOUT_S = 10.0  # for the kernel to end a program's processes and free what they had
CHUNK_BYTES = 65_536
CPU_SLACK = 0.9  # the limit counts whole ticks, so it may end a program a little early
_SEALS = 0x0001 | 0x0002 | 0x0004 | 0x0008  # F_SEAL_SEAL, SHRINK, GROW, WRITE
_F_ADD_SEALS = 1033

State = Literal["finished", "runtime_error", "timeout", "memory", "output_limit"]


class SandboxLost(Exception):
    """The sandbox itself failed: no statement about the program."""


class MalformedReply(Exception):
    """The program sent something that is no message."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended and what it left; all of it is the program's claim."""

    state: State
    stdout: bytes = b""
    stderr: str = ""  # the last ERROR_BYTES
    value: Any = None  # of a function call: decoded without hashing
    cpu_s: float = 0.0


class Report(NamedTuple):
    """What the zygote says of a program's end."""

    ended: bool
    exit: int
    cpu_s: float
    error: bytes  # why it never began


class Job:
    """One program in its jail, from `send_fds` to its end."""

    def __init__(
        self, zygote: socket.socket, payload: dict[str, Any], stdin: bytes, limits: Limits
    ) -> None:
        """Hand the program to the zygote; scripts get pipes, the other modes a channel."""
        self.limits = limits
        self.deadline = time.monotonic() + limits.wall_s
        self._stdout, self._stderr = bytearray(), bytearray()
        self._report: Report | None = None
        with_channel = payload["mode"] != "script"
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pipes, theirs = _pipes(with_channel)
        self.channel, channel = socket.socketpair() if with_channel else (None, None)
        given = [control.fileno(), _sealed(marshal.dumps(payload)), _sealed(stdin), *theirs]
        try:
            files = given + ([channel.fileno()] if channel else [])
            socket.send_fds(zygote, [marshal.dumps(astuple(limits))], files)
        except OSError as error:
            self._release()
            raise SandboxLost(f"the zygote is gone: {error}") from error
        finally:
            control.close()
            if channel is not None:
                channel.close()
            for file in given[1:]:
                os.close(file)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the program, if it has not ended, and wait until all its processes are gone."""
        try:
            if self._report is None:
                self._control.shutdown(socket.SHUT_WR)
                self._control.settimeout(END_TIMEOUT_S)
                while self._take_report():
                    pass
        except OSError as error:
            raise SandboxLost(f"a program could not be ended: {error}") from error
        finally:
            self._release()

    def _release(self) -> None:
        self._control.close()
        if self.channel is not None:
            self.channel.close()
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes = []

    def outcome(self) -> Outcome:
        """Wait for the end, taking the output."""
        state = self._pump()
        return Outcome(
            state,
            bytes(self._stdout),
            self._stderr.decode("utf-8", "replace"),
            cpu_s=self.cpu_s,
        )

    @property
    def cpu_s(self) -> float:
        """Of all its processes, once it has ended."""
        return self._report.cpu_s if self._report else 0.0

    def ask(self, message: bytes, deadline: float) -> bytes:
        """One message in, one out. TimeoutError, MalformedReply; EOFError: the program is gone."""
        self.send(message, deadline)
        return self.receive(deadline)

    def send(self, message: bytes, deadline: float) -> None:
        try:
            self._bounded(deadline).sendall(FRAME.pack(len(message)) + message)
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError("the program has ended") from None

    def receive(self, deadline: float) -> bytes:
        (length,) = FRAME.unpack(self._read(FRAME.size, deadline))
        if length > MESSAGE_BYTES:
            raise MalformedReply(f"a message of {length} bytes")
        return self._read(length, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                chunk = self._bounded(deadline).recv(min(CHUNK_BYTES, length - len(data)))
            except ConnectionResetError:
                chunk = b""
            if not chunk:
                raise EOFError("the program has ended")
            data += chunk
        return bytes(data)

    def _bounded(self, deadline: float) -> socket.socket:
        left = min(deadline, self.deadline) - time.monotonic()
        if left <= 0 or self.channel is None:
            raise TimeoutError
        self.channel.settimeout(left)
        return self.channel

    def _pump(self) -> State:
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ, self._take_report)
            takers = (self._take_stderr, self._take_stdout)[: len(self._pipes)]
            for pipe, taker in zip(self._pipes, takers, strict=True):
                selector.register(pipe, selectors.EVENT_READ, taker)
            while selector.get_map():
                left = self.deadline - time.monotonic()
                if left <= 0:
                    return "timeout"
                for key, _ in selector.select(left):
                    if not key.data():
                        selector.unregister(key.fileobj)
                if len(self._stdout) > self.limits.output_bytes:
                    return "output_limit"
        return self._state()

    def _take_stdout(self) -> bool:
        chunk = os.read(self._pipes[1], CHUNK_BYTES)
        self._stdout += chunk
        return bool(chunk)

    def _take_stderr(self) -> bool:
        chunk = os.read(self._pipes[0], CHUNK_BYTES)
        self._stderr += chunk
        del self._stderr[:-ERROR_BYTES]
        return bool(chunk)

    def _take_report(self) -> bool:
        """The first packet counts: later ones cannot be, the program has no such descriptor."""
        try:
            packet = self._control.recv(CHUNK_BYTES)
        except ConnectionResetError:
            packet = b""
        if packet and self._report is None:
            self._report = Report(*REPORT.unpack_from(packet), packet[REPORT.size :])
        return bool(packet)

    def _state(self) -> State:
        report = self._report
        if report is None:
            raise SandboxLost("the zygote ended")
        if not report.ended:
            raise SandboxLost(f"a jail could not be made: {report.error.decode(errors='replace')}")
        killed = report.exit == -signal.SIGKILL
        if report.cpu_s >= self.limits.cpu_s * (CPU_SLACK if killed else 1):
            return "timeout"
        if report.exit == 0:
            return "finished"
        return "memory" if b"MemoryError" in self._stderr[-200:] else "runtime_error"


def read_value(message: bytes) -> Any:
    """A hostile reply, decoded without hashing: ("value", v) or ("error", type, text)."""
    try:
        reply = decode(message, hashing=False)
    except CodecError as error:
        raise MalformedReply(str(error)) from None
    kinds = [type(part) for part in reply] if type(reply) is tuple else []
    is_value = len(kinds) == 2 and kinds[0] is str and reply[0] == "value"
    if not is_value and not (kinds == [str, str, str] and reply[0] == "error"):
        raise MalformedReply("neither a value nor an error")
    return reply


def _pipes(quiet: bool) -> tuple[list[int], list[int]]:
    """Our ends (stderr, stdout) and the program's (stdout, stderr); `quiet`: stdout is not kept."""
    stderr, stderr_in = os.pipe()
    if quiet:
        return [stderr], [os.open(os.devnull, os.O_WRONLY), stderr_in]
    stdout, stdout_in = os.pipe()
    return [stderr, stdout], [stdout_in, stderr_in]


def _sealed(data: bytes) -> int:
    """A memory file that nobody can change any more, at its beginning."""
    file = os.memfd_create("h1r", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(file, _F_ADD_SEALS, _SEALS)
    return file
