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
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rewards.sandbox import codec
from rewards.sandbox.jobs import Outcome, SandboxLost, State
from rewards.sandbox.limits import ERROR_BYTES, Limits

OVERHEAD_S = 30.0  # queueing in the service

# Runs the program as a module and prints the function's value as plain data in hexadecimal.
_CALL = """\
import sys, types
plain = types.ModuleType("plain"); sys.modules["plain"] = plain
exec({codec!r}, plain.__dict__)
module = types.ModuleType("solution"); sys.modules["solution"] = module
exec({source!r}, module.__dict__)
owner = getattr(module, "Solution", None)
owner = owner() if isinstance(owner, type) and hasattr(owner, {entry!r}) else module
value = getattr(owner, {entry!r})(*plain.decode(bytes.fromhex({arguments!r})))
print("\\n" + {marker!r} + plain.encode(value).hex())
"""


class HttpExecutor:
    """Stateless but for whose turn it is."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        self._urls = urls
        self._turns = itertools.cycle(range(len(urls)))
        self._lock = threading.Lock()

    def script(self, source: str, stdin: bytes, limits: Limits) -> Outcome:
        reply = self._ask(
            {
                "code": source,
                "language": "python",
                "stdin": stdin.decode("utf-8", "surrogateescape"),
                "compile_timeout": limits.wall_s,
                "run_timeout": limits.wall_s,
                "memory_limit_MB": limits.memory_bytes >> 20,
            },
            limits,
        )
        return _outcome(reply.get("run_result") or {}, limits)

    def call(self, source: str, entry: str, arguments: list[Any], limits: Limits) -> Outcome:
        marker = os.urandom(16).hex()  # a value among whatever the program prints
        text = _CALL.format(
            codec=Path(codec.__file__).read_text(), source=source, entry=entry, marker=marker,
            arguments=codec.encode(arguments).hex(),
        )
        outcome = self.script(text, b"", limits)
        _, found, value = outcome.stdout.rpartition(b"\n" + marker.encode())
        if outcome.state != "finished":
            return Outcome(outcome.state, stderr=outcome.stderr)
        try:
            data = bytes.fromhex(value.decode("ascii").strip() if found else "")
            return Outcome("finished", value=codec.decode(data, hashing=False))
        except ValueError:
            return Outcome("runtime_error", stderr=outcome.stderr)

    def check(self, source: str, test: dict[str, str], limits: Limits) -> tuple[str, str]:
        return "unsupported", "check_needs_namespaces"

    def close(self) -> None:
        """Nothing is held."""

    def _ask(self, body: dict[str, Any], limits: Limits) -> dict[str, Any]:
        errors = []
        data = json.dumps(body).encode("ascii")
        for _ in self._urls:
            with self._lock:
                url = self._urls[next(self._turns)]
            request = urllib.request.Request(
                url.rstrip("/") + "/run_code", data, {"Content-Type": "application/json"}
            )
            most = 8 * limits.output_bytes + (1 << 20)  # JSON escapes a byte as up to six
            try:
                with urllib.request.urlopen(request, timeout=limits.wall_s + OVERHEAD_S) as answer:
                    reply = json.loads(answer.read(most))
            except (OSError, ValueError) as error:
                errors.append(f"{url}: {error}")
                continue
            if isinstance(reply, dict) and reply.get("status") in ("Success", "Failed"):
                return reply
            errors.append(f"{url}: {str(reply)[:200]}")
        raise SandboxLost("; ".join(errors))


def _outcome(result: dict[str, Any], limits: Limits) -> Outcome:
    stdout = str(result.get("stdout") or "").encode("utf-8", "surrogateescape")
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
