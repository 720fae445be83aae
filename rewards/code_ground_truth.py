r"""What a code problem's `ground_truth` column says, as JSON, in one of three forms.

    script  {"tests": [{"input": "3 4\n", "output": "7\n"}, ...]}
            Each input goes to standard input; standard output is compared by lines, then by tokens
            (numbers by value).
    call    {"fn_name": "add", "tests": [{"input": "3\n4", "output": "7"}, ...]}
            Each input holds JSON arguments, one a line, for a function or a method of a class
            `Solution`; output is the JSON of its value.
    check   {"check": "def check(candidate):\n    assert candidate(3, 4) == 7\n",
             "entry_point": "add"}
            Python source that defines `check`, or asserts by the function's name. It runs in a
            jail of its own, after the prompt's own imports and helpers: the prompt's last code
            block, or the whole prompt where that defines the function (HumanEval), or the optional
            "helpers". Arguments and values are plain data, passed by value.

Optional in all forms but `check`: "tolerance" (default 0), absolute or relative, for numbers.

Invariant: what `parse` accepts can be judged; anything else is found when data is loaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from rewards.sandbox.codec import CodecError, encode


class BadGroundTruth(ValueError):
    """The reason, as a code."""


@dataclass(frozen=True, slots=True)
class CodeProblem:
    """Example: CodeProblem("call", (([3, 4], 7),), entry_point="add")."""

    kind: Literal["script", "call", "check"]
    tests: tuple[tuple[Any, Any], ...] = ()  # (stdin, stdout) or (arguments, value)
    entry_point: str = ""
    check: str = ""
    helpers: str | None = None  # None: the prompt's own
    tolerance: float = 0.0


def parse(ground_truth: str) -> CodeProblem:
    """The problem; BadGroundTruth where there is none."""
    try:
        data = json.loads(ground_truth)
    except (ValueError, RecursionError):
        raise BadGroundTruth("not_json") from None
    if not isinstance(data, dict):
        raise BadGroundTruth("not_an_object")
    if "check" in data:
        return _check(data)
    tests = data.get("tests")
    if not isinstance(tests, list) or not tests:
        raise BadGroundTruth("no_tests")
    if not all(isinstance(t, dict) and _texts(t.get("input"), t.get("output")) for t in tests):
        raise BadGroundTruth("test_without_input_or_output")
    tolerance = data.get("tolerance", 0.0)
    if type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf:
        raise BadGroundTruth("bad_tolerance")
    if "fn_name" not in data:
        pairs = tuple((test["input"], test["output"]) for test in tests)
        return CodeProblem("script", pairs, tolerance=float(tolerance))
    pairs = tuple(_call(test) for test in tests)
    return CodeProblem("call", pairs, _name(data["fn_name"]), tolerance=float(tolerance))


def _check(data: dict[str, Any]) -> CodeProblem:
    helpers = data.get("helpers")
    if not _texts(data["check"], "" if helpers is None else helpers) or not data["check"].strip():
        raise BadGroundTruth("check_without_source")
    for source in (data["check"], helpers or ""):
        try:
            compile(source, "check", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise BadGroundTruth("check_does_not_compile") from None
    name = _name(data.get("entry_point"))
    return CodeProblem("check", entry_point=name, check=data["check"], helpers=helpers)


def _call(test: dict[str, str]) -> tuple[list[Any], Any]:
    try:
        lines = [line for line in test["input"].split("\n") if line.strip()]
        return [json.loads(line) for line in lines], json.loads(test["output"])
    except (ValueError, RecursionError):
        raise BadGroundTruth("test_is_not_json") from None


def reach_the_function(problem: CodeProblem) -> bool:
    """Whether all arguments are few and flat enough to be passed into a jail."""
    try:
        for arguments, _ in problem.tests if problem.kind == "call" else ():
            encode(("call", tuple(arguments), {}))
    except CodecError:
        return False
    return True


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise BadGroundTruth("no_function_name")
    return name


def _texts(*values: Any) -> bool:
    """Each is a string, and one that UTF-8 can carry."""
    try:
        return all(isinstance(value, str) and value.encode() is not None for value in values)
    except UnicodeEncodeError:
        return False
