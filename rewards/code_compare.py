"""Is a program's claim the expected answer? Outside the jail, on bytes and plain data.

Invariant: linear in what is compared; nothing of a program's is executed, hashed or trusted with
a comparison of its own: values are of exact built-in types (`rewards.sandbox.codec`).
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from rewards.sandbox.codec import Members, Pairs

MAX_NUMBER_CHARS = 400
MAX_INT_KEY = 1 << 64  # longer ones are no keys: their digits cost quadratic time

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")

_PADDED = re.compile(r"[+-]?0[0-9]")


def same_output(claimed: bytes, expected: str, tolerance: float = 0.0) -> bool:
    """Equal lines but for space at their ends, or equal tokens line by line, numbers by value."""
    ours = _lines(claimed.decode("utf-8", "surrogateescape"))
    theirs = _lines(expected)
    if ours == theirs:
        return True
    return len(ours) == len(theirs) and all(
        _same_line(a, b, tolerance) for a, b in zip(ours, theirs, strict=True)
    )


def same_value(claimed: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """`claimed` as decoded without hashing, `expected` from JSON.

    As in JSON a tuple is a list and a key is text; nan is nan; True is 1, as Python has it.
    """
    if isinstance(expected, list):
        return (
            type(claimed) in (list, tuple)
            and len(claimed) == len(expected)
            and all(same_value(a, b, tolerance) for a, b in zip(claimed, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            type(claimed) is Pairs
            and len(claimed) == len(expected)
            and {_key(key) for key, _ in claimed} == expected.keys()  # a forged one may repeat
            and all(same_value(value, expected[_key(key)], tolerance) for key, value in claimed)
        )
    if type(claimed) in (list, tuple, Pairs, Members):
        return False
    if _number(claimed) and _number(expected) and tolerance:
        return _close(claimed, expected, tolerance)
    return bool(claimed == expected) or (_nan(claimed) and _nan(expected))


def _key(key: Any) -> str | None:
    """The key as JSON writes it; None for one that it cannot."""
    if type(key) is str:
        return key
    if key is None or type(key) in (bool, float) or (type(key) is int and abs(key) < MAX_INT_KEY):
        return json.dumps(key)
    return None


def _nan(value: Any) -> bool:
    return type(value) is float and value != value


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def _same_line(ours: str, theirs: str, tolerance: float) -> bool:
    a, b = ours.split(), theirs.split()
    return len(a) == len(b) and all(
        _same_token(x, y, tolerance) for x, y in zip(a, b, strict=True)
    )


def _same_token(ours: str, theirs: str, tolerance: float) -> bool:
    if ours == theirs:
        return True
    if max(len(ours), len(theirs)) > MAX_NUMBER_CHARS:
        return False
    if bool(_PADDED.match(ours)) != bool(_PADDED.match(theirs)):
        return False  # 0011 is a string of digits
    if not (_NUMBER.fullmatch(ours) and _NUMBER.fullmatch(theirs)):
        return False
    if Decimal(ours) == Decimal(theirs):
        return True
    return tolerance > 0 and _close(float(ours), float(theirs), tolerance)


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _close(a: float, b: float, tolerance: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an int beyond any float
        return False
