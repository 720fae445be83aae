"""Programs run by SandboxFusion-compatible services: POST /run_code, several in turn.

Invariant: grading stays here; the service sees programs and inputs, never an expected answer. One
that cannot be reached, or says SandboxError, is passed over for the next; when none is left the
program raises SandboxLost. A prompt's own test of a candidate needs two jails that talk, which
this interface cannot give: such problems have no verdict here.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from http.client import HTTPException
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.http_post import post
from rewards.sandbox import codec, usual_names
from rewards.sandbox.jobs import Outcome, SandboxLost, State
from rewards.sandbox.limits import ERROR_BYTES, Limits

NEEDS_NAMESPACES = "check_needs_namespaces"
OVERHEAD_S = 30.0  # queueing in the service

# What the service runs, as `program` does in a jail: the program's module with the usual names and
# the prompt's imports, each of our own texts in a module by itself.
_LOAD = """\
import sys, types
def load(name, text=None):
    module = sys.modules[name] = types.ModuleType(name)
    if text is not None:
        exec(text, module.__dict__)
    return module
code = compile({source!r}, "solution.py", "exec", dont_inherit=True)
prepare = load("usual_names", {usual_names!r}).prepare
"""
_SCRIPT = _LOAD + """\
module = load("__main__")
prepare(module.__dict__, code, {imports!r})
exec(code, module.__dict__)
"""
# Prints the function's value as plain data in hexadecimal.
_CALL = _LOAD + """\
codec = load("codec", {codec!r})
module = load("solution")
prepare(module.__dict__, code, {imports!r})
exec(code, module.__dict__)
owner = getattr(module, "Solution", None)
owner = owner() if isinstance(owner, type) and hasattr(owner, {entry!r}) else module
value = getattr(owner, {entry!r})(*codec.decode(bytes.fromhex({arguments!r})))
print("\\n" + {marker!r} + codec.encode(codec.plain(value)).hex())
"""


class HttpExecutor:
    """Stateless but for whose turn it is."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        self._urls = urls
        self._turns = itertools.cycle(range(len(urls)))
        self._lock = threading.Lock()

    def script(
        self, source: str, stdin: bytes, limits: Limits, imports: tuple[str, ...] = ()
    ) -> Outcome:
        text = _SCRIPT.format(source=source, usual_names=_text(usual_names), imports=imports)
        return self._run(text, stdin, limits)

    def call(
        self, source: str, entry: str, arguments: list[Any], limits: Limits,
        imports: tuple[str, ...] = (),
    ) -> Outcome:
        marker = os.urandom(16).hex()  # a value among whatever the program prints
        text = _CALL.format(
            codec=_text(codec), usual_names=_text(usual_names), imports=imports, source=source,
            entry=entry, marker=marker, arguments=codec.encode(arguments).hex(),
        )
        outcome = self._run(text, b"", limits)
        _, found, value = outcome.stdout.rpartition(b"\n" + marker.encode())
        if outcome.state != "finished":
            return Outcome(outcome.state, stderr=outcome.stderr)
        try:
            data = bytes.fromhex(value.decode("ascii").strip() if found else "")
            return Outcome("finished", value=codec.decode(data, hashing=False))
        except ValueError:
            return Outcome("runtime_error", stderr=outcome.stderr)

    def check(self, source: str, test: dict[str, str], limits: Limits) -> tuple[str, str]:
        return "unsupported", NEEDS_NAMESPACES

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, text: str, stdin: bytes, limits: Limits) -> Outcome:
        reply = self._ask(
            {
                "code": text,
                "language": "python",
                "stdin": stdin.decode("utf-8", "surrogateescape"),
                "compile_timeout": limits.wall_s,
                "run_timeout": limits.wall_s,
                "memory_limit_MB": limits.memory_bytes >> 20,
            },
            limits,
        )
        return Outcome("output_limit") if reply is None else _outcome(reply, limits)

    def _ask(self, body: dict[str, Any], limits: Limits) -> dict[str, Any] | None:
        """`run_result` of the first service that has one; None: it is longer than any allowed
        output makes it, which is the program's doing and no failure of the service's."""
        errors = []
        data = json.dumps(body).encode("ascii")
        for _ in self._urls:
            with self._lock:
                url = self._urls[next(self._turns)]
            most = 8 * limits.output_bytes + (1 << 20)  # JSON escapes a byte as up to six
            try:
                status, _, answered = post(
                    url.rstrip("/") + "/run_code", {}, data, limits.wall_s + OVERHEAD_S, most
                )
                if status != 200:
                    raise OSError(f"HTTP status {status}")
                if len(answered) > most:
                    return None
                reply = json.loads(answered)
            except (OSError, ValueError, HTTPException) as error:
                errors.append(f"{url}: {error}")
                continue
            if isinstance(reply, dict) and reply.get("status") in ("Success", "Failed"):
                return reply.get("run_result") or {}
            errors.append(f"{url}: {str(reply)[:200]}")
        raise SandboxLost("; ".join(errors))


def _text(module: ModuleType) -> str:
    return Path(module.__file__ or "").read_text()


def _outcome(result: dict[str, Any], limits: Limits) -> Outcome:
    stdout = str(result.get("stdout") or "").encode("utf-8", "surrogatepass")
    stderr = str(result.get("stderr") or "")[-ERROR_BYTES:]
    state: State = "runtime_error"
    if result.get("status") == "TimeLimitExceeded":
        state = "timeout"
    elif len(stdout) > limits.output_bytes:
        state = "output_limit"
    elif result.get("status") == "Finished" and result.get("return_code") == 0:
        state = "finished"
    elif "MemoryError" in stderr[-200:]:
        state = "memory"
    return Outcome(state, stdout, stderr)
