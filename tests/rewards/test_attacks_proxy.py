"""Attacks on the way back: function values and the proxy between a test and its candidate."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from h1r_rl.config.schema import CodeConfig, RewardConfig
from h1r_rl.records import Prompt, Verdict
from rewards.code_verifier import executor_for, verify
from rewards.sandbox.codec import MESSAGE_BYTES, encode
from rewards.sandbox.executor import _relay
from rewards.sandbox.program import _exception

CODE = CodeConfig(cpu_s=2, wall_s=8, total_s=20, memory_mib=256, output_mib=1, processes=6)
PROMPT_S = 15.0


@pytest.fixture(scope="module")
def options(namespaces):
    return RewardConfig(code=CODE)


def verdict(options: RewardConfig, source: str, truth: dict) -> Verdict:
    prompt = Prompt("p", 0, np.arange(2, dtype=np.int32), "q", "code", json.dumps(truth))
    return verify(prompt, f"```python\n{source}\n```", options)


CALL = {"fn_name": "f", "tests": [{"input": "3\n4", "output": "7"}]}
CHECK = {
    "check": "def check(candidate):\n    assert candidate(3, 4) == 7\n"
    "    assert candidate(1, 1) == 2\n",
    "entry_point": "f",
}
LOOP_CHECK = {  # a loop that an exception of the candidate's could end early
    "check": "def check(candidate):\n    for got, want in zip(map(candidate, [1, 2]), [2, 3]):\n"
    "        assert got == want\n",
    "entry_point": "f",
}

VALUES = {
    "patched_eq": "class A:\n    __eq__ = lambda s, o: True\n    __hash__ = None\n"
    "def f(*a): return A()",
    "int_subclass": "class A(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\n"
    "def f(*a): return A(1)",
    "str_subclass": "class A(str):\n    __eq__ = lambda s, o: True\n    __hash__ = str.__hash__\n"
    "def f(*a): return A('x')",
    "list_of_patched": "class A(float):\n    __eq__ = lambda s, o: True\n    __hash__ = None\n"
    "def f(*a): return [A(1)]",
    "nan": "def f(*a): return float('nan')",
    "function": "def f(*a): return f",
    "generator": "def f(*a): yield 7",
    "type": "def f(*a): return int",
    "nested_deep": "def f(*a):\n    v = []\n    for _ in range(100_000): v = [v]\n    return v",
    "circular": "def f(*a):\n    v = []\n    v.append(v)\n    return v",
    "huge_int": "def f(*a): return 1 << (10**8)",
    "huge_list": "def f(*a): return [0] * (20 << 20)",
    "colliding_keys": "def f(*a): return {i * (2**61 - 1): 0 for i in range(2000)}",
    "system_exit": "def f(*a): raise SystemExit(0)",
    "os_exit": "import os\ndef f(*a): os._exit(0)",
    "exit_at_import": "import sys\nsys.exit(0)\ndef f(*a): return 7",
    "assertion_error_patched": "import builtins\nbuiltins.AssertionError = type('A', (), {})\n"
    "def f(*a): return 0",
    "raises_assertion": "def f(*a): raise AssertionError",
    "raises_stop_iteration": "def f(*a): raise StopIteration",
    "error_whose_text_raises": "class E(Exception):\n    def __str__(self): raise SystemExit\n"
    "def f(*a): raise E",
    "recursion": "def f(*a): return f(*a)",
    "loops": "def f(*a):\n    while True: pass",
}

_WRITE = (
    "import os, pickle, struct\n"
    "def f(*a):\n"
    "    m = {message}\n"
    "    os.write(3, struct.pack('<I', len(m)) + m)\n"
    "    os.write(3, struct.pack('<I', len(m)) + m)\n"
    "    import time; time.sleep(1)\n"
)
_PICKLE = (
    "class P:\n    def __reduce__(self): return (exec, ('import os; os._exit(0)',))\n"
) + _WRITE
MESSAGES = {
    "forged_done": _WRITE.format(message=r"b't\3\0\0\0s\4\0\0\0dones\6\0\0\0passeds\0\0\0\0'"),
    "forged_passed_text": _WRITE.format(message="b'passed'"),
    "pickle": _PICKLE.replace("{message}", "pickle.dumps(P())"),
    "pickle_in_bytes": "import pickle\nclass P:\n    def __reduce__(self): return (exec, ('x',))\n"
    "def f(*a): return pickle.dumps(P())",
    "no_tuple": _WRITE.format(message="b'N'"),
    "one_part": _WRITE.format(message=r"b't\1\0\0\0s\5\0\0\0value'"),
    "garbage": _WRITE.format(message="os.urandom(1000)"),
    "empty": _WRITE.format(message="b''"),
    "announces_four_gigabytes": "import os\ndef f(*a): os.write(3, b'\\xff\\xff\\xff\\xff')",
    "announces_items": _WRITE.format(message=r"b't\2\0\0\0s\5\0\0\0valuel\xff\xff\xff\xff'"),
    "unhashable_key": _WRITE.format(
        message=r"b't\2\0\0\0s\5\0\0\0valued\1\0\0\0l\0\0\0\0N'"
    ),
    "error_of_odd_type": _WRITE.format(message=r"b't\3\0\0\0s\5\0\0\0errorNN'"),
    "endless_stream": "import os\ndef f(*a):\n    while True: os.write(3, b'\\1\\0\\0\\0N' * 9999)",
    "closes_the_channel": "import os\ndef f(*a): os.close(3)",
    "answers_before_asked": "import os, struct\n"
    r"m = b't\2\0\0\0s\5\0\0\0valueT'" "\n"
    "os.write(3, (struct.pack('<I', len(m)) + m) * 50)\n"
    "def f(*a): return 0",
}


@pytest.mark.parametrize("truth", [CALL, CHECK], ids=["call", "check"])
@pytest.mark.parametrize("source", [pytest.param(s, id=n) for n, s in (VALUES | MESSAGES).items()])
def test_value_is_refused(source, truth, options):
    executor, zygote = executor_for(options), executor_for(options).pid
    assert verdict(options, source, truth).score == 0.0
    assert executor.pid == zygote
    started = time.monotonic()
    assert verdict(options, "def f(a, b): return a + b", truth).score == 1.0
    assert time.monotonic() - started < PROMPT_S


def test_a_forged_dict_with_a_key_twice_is_not_the_expected_one(options):
    """No interpreter makes it, a message can say it: half the answer is not the answer."""
    truth = {"fn_name": "f", "tests": [{"input": "3", "output": '{"a": 1, "b": 2}'}]}
    pair = r"s\1\0\0\0ai\1\0\0\0\1"
    message = rf"b't\2\0\0\0s\5\0\0\0valued\2\0\0\0{pair}{pair}'"
    assert verdict(options, _WRITE.format(message=message), truth).score == 0.0
    assert verdict(options, "def f(x): return {'b': 2, 'a': 1}", truth).score == 1.0


@pytest.mark.parametrize(
    "value", ["'x' * (5 << 20)", "'x' * ((4 << 20) - 40)", "deep"],
    ids=["too_large", "large", "deep"],
)
def test_no_value_makes_the_test_impossible(value, options):
    """A value that the test cannot pass on is a wrong answer, never one without a score."""
    check = "def check(candidate):\n    got = candidate(1)\n    candidate([got, got])\n"
    source = f"deep = 0\nfor _ in range(62): deep = [deep]\ndef f(x): return {value}"
    found = verdict(options, source, {"check": check, "entry_point": "f"})
    assert (found.score, found.reason) == (0.0, "wrong")


def test_no_exception_ends_the_tests_loop(options):
    assert verdict(options, "def f(x): return x + 1", LOOP_CHECK).score == 1.0
    kinds = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "SystemExit", "IndexError")
    for kind in kinds:
        assert verdict(options, f"def f(x): raise {kind}", LOOP_CHECK).score == 0.0
    named = "class StopIteration(Exception): pass\ndef f(x): raise StopIteration"
    assert verdict(options, named, LOOP_CHECK).score == 0.0


def test_an_exception_that_would_end_the_test_arrives_as_another():
    for name in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "print", ""):
        assert type(_exception(name, "text")) is RuntimeError
    assert type(_exception("KeyError", "text")) is KeyError


def test_no_malformed_reply_reaches_the_test():
    """What the candidate sends is checked outside, before the test's jail reads it."""

    class Judge:
        deadline = 0.0

        def receive(self, deadline: float) -> bytes:
            return encode(("call", (1,), {}))

    class Hostile:
        deadline = 0.0

        def ask(self, message: bytes, deadline: float) -> bytes:
            return encode(("done", "passed", ""))

    assert _relay(Judge(), Hostile()) == ("failed", "malformed_reply")


def test_a_value_too_large_to_be_passed_back_is_a_wrong_one(options):
    """It fits into a reply and not into a call: the candidate's doing, no fault of the test's."""
    check = "def check(candidate):\n    assert candidate(candidate(1)) == 1\n"
    truth = {"check": check, "entry_point": "f"}
    largest = f"def f(x): return 'x' * ({MESSAGE_BYTES} - 20) if x == 1 else 1"
    found = verdict(options, largest, truth)
    assert (found.score, found.reason) == (0.0, "wrong")


def test_candidate_cannot_find_the_tests_source(options):
    search = """
import gc, os, sys
def f(*arguments):
    seen = [repr(thing)[:10_000] for thing in gc.get_objects() if isinstance(thing, (str, dict))]
    frame = sys._getframe()
    while frame:
        seen.append(repr(frame.f_locals) + repr(frame.f_globals)[:10_000])
        frame = frame.f_back
    for file in range(256):
        try:
            seen.append(os.pread(file, 1 << 20, 0).decode("latin-1"))
        except OSError:
            pass
    return any("mark" + "er_of_the_test" in text for text in seen)
"""
    truth = {
        "check": "marker_of_the_test = 1\ndef check(candidate):\n    assert candidate(3) is True\n",
        "entry_point": "f",
    }
    assert verdict(options, search, truth).score == 0.0
    assert verdict(options, search + "\nmarker_of_the_test = 1\n", truth).score == 1.0


def test_test_stays_in_its_own_jail(options):
    """A candidate that patches everything within reach changes nothing in the test's process."""
    source = """
import builtins, os, sys
builtins.print = builtins.isinstance = builtins.abs = lambda *a, **k: True
for name in list(sys.modules):
    sys.modules[name] = None
def f(x): return -1
"""
    truth = {
        "check": "import math\ndef check(candidate):\n    assert abs(candidate(1) - 2) < 1e-6\n"
        "    assert isinstance(candidate(1), int) and math.sqrt(4) == 2\n",
        "entry_point": "f",
    }
    helpful = """
import builtins
builtins.abs, builtins.isinstance = lambda x: 0, lambda *a: True
def f(x): return -1
"""  # would pass the test where it ran beside it
    for patched in (source, helpful):
        assert verdict(options, patched, truth).score == 0.0
    assert verdict(options, "def f(x): return x + 1", truth).score == 1.0
