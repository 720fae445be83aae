"""The wire of the sandbox: exact plain types both ways, and nothing that hostile bytes can do."""

from __future__ import annotations

import enum
import math
import time
from collections import Counter, deque
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.sandbox.codec import CodecError, Members, Pairs, decode, encode, plain

hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8,
)
values = st.recursive(
    hashable,
    lambda inner: st.lists(inner, max_size=4) | st.sets(hashable, max_size=4)
    | st.dictionaries(hashable, inner, max_size=4),
    max_leaves=12,
)


def typed(value):
    """Equality of values with their types: 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return type(value), [typed(v) for v in value]
    if isinstance(value, dict):
        return dict, [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, set):
        return set, sorted(repr(typed(v)) for v in value)
    return type(value), repr(value)


@settings(max_examples=200, deadline=None)
@given(values)
def test_values_come_back_as_they_were(value):
    assert typed(decode(encode(value))) == typed(value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=50).map(lambda b: b"t\2\0\0\0" + b))
def test_any_bytes_give_a_value_or_an_error(data):
    for hashing in (True, False):
        try:
            decode(data, hashing)
        except CodecError:
            pass


def test_special_floats():
    found = decode(encode([math.inf, -math.inf, math.nan, -0.0]))
    assert found[:2] == [math.inf, -math.inf]
    assert math.isnan(found[2])
    assert math.copysign(1, found[3]) == -1


class _Int(int): ...
class _Str(str): ...  # noqa: E302
class _Colour(enum.IntEnum):  # noqa: E302
    RED = 1


@pytest.mark.parametrize(
    "value",
    [_Int(1), _Str("x"), _Colour.RED, object(), int, len, range(3), frozenset(), bytearray(b"x"),
     iter([]), Exception(), [_Int(1)], {_Str("k"): 1}, {"k": _Int(1)}],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_refused(value):
    with pytest.raises(CodecError):
        encode(value)


class _Pair(NamedTuple):
    x: object
    y: object


def test_plain_leaves_exact_types_and_is_bounded():
    value = [Counter("aa"), {_Str("k"): _Int(1)}, _Pair(_Colour.RED, True), frozenset([_Int(3)])]
    found = plain(value)
    assert typed(found) == typed([{"a": 2}, {"k": 1}, (1, True), {3}])
    assert typed(decode(encode(found))) == typed(found)
    circle: list = []
    circle.append(circle)
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    for endless in (circle, deep):
        with pytest.raises(CodecError):
            plain(endless)
    for other in (object(), deque([1]), bytearray(b"x"), range(3)):
        assert plain(other) is other  # for `encode` to refuse


def test_depth_size_and_circles_are_bounded():
    deep: list = []
    for _ in range(100):
        deep = [deep]
    circle: list = []
    circle.append(circle)
    for value in (deep, circle, "x" * (5 << 20), [0] * (2 << 20)):
        with pytest.raises(CodecError):
            encode(value)
    for data in (b"l\1\0\0\0" * 100 + b"N", b"NN", b""):
        with pytest.raises(CodecError):
            decode(data)


def test_announced_counts_are_checked_before_memory_is_taken():
    for tag in (b"l", b"t", b"d", b"e", b"s", b"i", b"b"):
        with pytest.raises(CodecError, match="announces more than it holds"):
            decode(tag + b"\xff\xff\xff\xff")


def test_colliding_keys_cost_nothing_outside():
    """Hash collisions make a dict quadratic; read without hashing they are a list."""
    keys = [i * (2**61 - 1) for i in range(60_000)]
    body = b"".join(encode(key) + b"N" for key in keys)
    data = b"d" + len(keys).to_bytes(4, "little") + body
    started = time.monotonic()
    assert type(decode(data, hashing=False)) is Pairs
    assert type(decode(b"e\1\0\0\0N", hashing=False)) is Members
    assert time.monotonic() - started < 20  # hashing them takes minutes
