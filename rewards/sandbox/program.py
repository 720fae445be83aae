"""What runs inside the jail, as the program: a script, a function to be called, or a prompt's test.

Invariant: nothing here is trusted by the outside. A script's output and a function's values are
data to be compared elsewhere; only the `check` mode reports a verdict, and its jail never holds
model output: it sees the candidate as plain data through a channel.
"""

from __future__ import annotations

import atexit
import builtins
import io
import os
import struct
import sys
import traceback
import types
from typing import Any, NoReturn

from rewards.sandbox.codec import CodecError, NotPlain, decode, encode, plain
from rewards.sandbox.usual_names import prepare

CHANNEL = 3
TRACEBACK_FRAMES = 30  # the last ones: a deep recursion has tens of thousands
FRAME = struct.Struct("<I")


def run(payload: dict[str, Any]) -> NoReturn:
    """Run `payload["mode"]` and end this process as the interpreter would."""
    code = 0
    try:
        _MODES[payload["mode"]](payload)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc(limit=-TRACEBACK_FRAMES)
        code = 1
    _finish(code)


def _finish(code: int) -> NoReturn:
    """Threads joined, exit functions run, streams flushed; no costly interpreter shutdown."""
    for step in (_join_threads, atexit._run_exitfuncs, _release_main, _flush):
        try:
            step()
        except BaseException:
            code = code or 1
    os._exit(code & 0xFF)


def _join_threads() -> None:
    """Where the program has imported the module that makes them; the zygote has not."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()


def _release_main() -> None:
    """Files that the script left open are flushed when their last name goes."""
    sys.modules["__main__"].__dict__.clear()


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _script(payload: dict[str, Any]) -> None:
    _execute(payload, _module("__main__"))


def _serve(payload: dict[str, Any]) -> None:
    """Answer calls of one function for as long as they come."""
    module = _module("solution")
    _execute(payload, module)
    function = _entry(module, payload["entry_point"])
    while True:
        _, arguments, keywords = receive()
        try:
            reply = _value(function(*arguments, **keywords))
        except Exception as error:
            kind = "TypeError" if isinstance(error, CodecError) else type(error).__name__[:100]
            reply = encode(("error", kind, _text(error)))
        send(reply)


def _value(value: Any) -> bytes:
    try:
        return encode(("value", value))
    except CodecError:
        return encode(("value", plain(value)))


def _check(payload: dict[str, Any]) -> None:
    """A prompt's own test against the candidate behind the channel."""
    module = _module("__main__")
    calls = 0

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        try:
            request = encode(("call", arguments, keywords))
        except NotPlain:
            _end_check("unsupported", "arguments_not_plain")
        except CodecError:  # a candidate's own value, passed back to it, may do that
            _end_check("failed" if calls else "unsupported", "arguments_too_large")
        calls += 1
        send(request)
        reply = receive()
        if reply[0] == "value":
            return reply[1]
        raise _exception(reply[1], reply[2])

    try:
        exec(_compiled(payload["helpers"]), module.__dict__)
    except BaseException:
        _end_check("unsupported", "helpers_fail")
    module.__dict__[payload["entry_point"]] = candidate
    try:
        exec(_compiled(payload["test"]), module.__dict__)
        if "check" in module.__dict__:
            module.__dict__["check"](candidate)
    except BaseException as error:
        _end_check("failed", type(error).__name__)
    if not calls:
        _end_check("unsupported", "test_calls_nothing")
    _end_check("passed", "")


def _end_check(state: str, reason: str) -> NoReturn:
    send(encode(("done", state, reason)))
    os._exit(0)


def _exception(name: str, text: str) -> Exception:
    """The built-in exception of that name, unless raising it could end a loop of the test."""
    kind = getattr(builtins, name, None)
    ends_loops = name in ("StopIteration", "StopAsyncIteration")
    if isinstance(kind, type) and issubclass(kind, Exception) and not ends_loops:
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and the like want more than a text
            pass
    return RuntimeError(text)


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = sys.modules["__main__"] = module
    sys.argv = ["solution.py"]
    return module


def _execute(payload: dict[str, Any], module: types.ModuleType) -> None:
    """The program as it is, so that its first line stays the first; a prompt's imports before."""
    code = _compiled(payload["source"])
    if "imports" in payload:
        prepare(module.__dict__, code, payload["imports"])
    exec(code, module.__dict__)


def _compiled(source: str) -> types.CodeType:
    return compile(source, "solution.py", "exec", dont_inherit=True)


def _entry(module: types.ModuleType, name: str) -> Any:
    """LiveCodeBench puts the function on a class Solution, HumanEval at top level."""
    solution = getattr(module, "Solution", None)
    if isinstance(solution, type) and hasattr(solution, name):
        return getattr(solution(), name)
    return getattr(module, name)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return ""


def send(message: bytes) -> None:
    view = memoryview(FRAME.pack(len(message)) + message)
    while view:
        view = view[os.write(CHANNEL, view) :]


def receive() -> Any:
    (length,) = FRAME.unpack(_read(FRAME.size))
    return decode(_read(length))


def _read(length: int) -> bytes:
    data = io.BytesIO()
    while data.tell() < length:
        chunk = os.read(CHANNEL, length - data.tell())
        if not chunk:
            os._exit(0)  # nobody asks any more
        data.write(chunk)
    return data.getvalue()


_MODES = {"script": _script, "serve": _serve, "check": _check}
