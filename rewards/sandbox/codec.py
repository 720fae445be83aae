"""Bounded plain data as bytes: all that passes between a jail and the outside.

Invariant: only None, bool, int, float, complex, str, bytes, list, tuple, dict and set of *exactly*
these types are written or read; a subclass is refused, so no code of the sender's travels. Reading
costs time and memory linear in the bytes, whatever they say: counts are checked against what is
left, nesting is bounded. Hashing is the one step that a sender can make quadratic, so a reader
outside a jail asks for `Pairs` and `Members`, which hash nothing.

Example: encode([1, "a"]) == b"l\\x02\\0\\0\\0" b"i\\x01\\0\\0\\0\\x01" b"s\\x01\\0\\0\\0a".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 64
MESSAGE_BYTES = 4 << 20

_COUNT = struct.Struct("<I")
_FLOAT = struct.Struct("<d")
_COMPLEX = struct.Struct("<dd")


class CodecError(ValueError):
    """Not plain data, or more of it than is let through."""


class NotPlain(CodecError):
    """A value of another type."""


class Pairs(list):
    """A dict read without hashing: [(key, value), ...]."""


class Members(list):
    """A set read without hashing."""


def plain(value: Any, depth: int = 0) -> Any:
    """A Counter as the dict that it is, and so on: only the built-in content of a value.

    For the program's own side, before `encode`, which lets no subclass through. A frozenset, equal
    to the set of its members, becomes it; a deque, equal to no list, is left to be refused.
    """
    if depth > MAX_DEPTH:
        raise CodecError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        items = dict.items(value)
        return {plain(key, depth + 1): plain(member, depth + 1) for key, member in items}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind([plain(member, depth + 1) for member in kind.__iter__(value)])
    if isinstance(value, frozenset):
        return {plain(member, depth + 1) for member in frozenset.__iter__(value)}
    for kind, convert in ((int, int.__int__), (float, float.__float__), (str, str.__str__)):
        if type(value) is not bool and isinstance(value, kind):
            return convert(value)
    return value


def encode(value: Any, limit: int = MESSAGE_BYTES) -> bytes:
    """`value` as bytes; CodecError for any other type, too much data, too deep or circular."""
    out = bytearray()
    _write(value, out, limit, 0)
    return bytes(out)


def decode(data: bytes, hashing: bool = True) -> Any:
    """What `encode` was given; dicts and sets as Pairs and Members where not `hashing`."""
    value, end = _read(memoryview(data), 0, 0, hashing)
    if end != len(data):
        raise CodecError(f"{len(data) - end} bytes after the value")
    return value


def _write(value: Any, out: bytearray, limit: int, depth: int) -> None:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise CodecError(f"nested deeper than {MAX_DEPTH}")
    if value is None or kind is bool:
        out += b"N" if value is None else b"T" if value else b"F"
    elif kind is float:
        out += b"f" + _FLOAT.pack(value)
    elif kind is complex:
        out += b"c" + _COMPLEX.pack(value.real, value.imag)
    elif kind in _BODY:
        tag, body = _BODY[kind][0], _BODY[kind][1](value)
        out += tag + _COUNT.pack(len(body)) + body
    elif kind in _ITEMS:
        out += _ITEMS[kind] + _COUNT.pack(len(value))
        members = value if kind is not dict else [part for pair in value.items() for part in pair]
        for member in members:
            _write(member, out, limit, depth + 1)
    else:
        raise NotPlain(f"expected plain data, found {kind.__name__}")
    if len(out) > limit:
        raise CodecError(f"more than {limit} bytes")


def _int_bytes(value: int) -> bytes:
    return value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)


_BODY: dict[type, tuple[bytes, Callable[[Any], bytes]]] = {
    int: (b"i", _int_bytes),
    str: (b"s", lambda value: value.encode("utf-8", "surrogatepass")),
    bytes: (b"b", lambda value: value),
}
_ITEMS = {list: b"l", tuple: b"t", dict: b"d", set: b"e"}
_PLAIN = {b"N": None, b"T": True, b"F": False}


def _read(data: memoryview, at: int, depth: int, hashing: bool) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise CodecError(f"nested deeper than {MAX_DEPTH}")
    tag, at = bytes(data[at : at + 1]), at + 1
    if tag in _PLAIN:
        return _PLAIN[tag], at
    try:
        if tag == b"f":
            return _FLOAT.unpack_from(data, at)[0], at + _FLOAT.size
        if tag == b"c":
            return complex(*_COMPLEX.unpack_from(data, at)), at + _COMPLEX.size
        (count,) = _COUNT.unpack_from(data, at)
    except struct.error:
        raise CodecError("ends within a value") from None
    at += _COUNT.size
    if count * (2 if tag == b"d" else 1) > len(data) - at:
        raise CodecError("announces more than it holds")
    if tag in (b"i", b"s", b"b"):
        return _read_body(tag, bytes(data[at : at + count])), at + count
    return _read_items(tag, count, data, at, depth, hashing)


def _read_body(tag: bytes, body: bytes) -> Any:
    if tag == b"i":
        return int.from_bytes(body, "little", signed=True)
    if tag == b"b":
        return body
    try:
        return body.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise CodecError("text that is not UTF-8") from None


def _read_items(
    tag: bytes, count: int, data: memoryview, at: int, depth: int, hashing: bool
) -> tuple[Any, int]:
    if tag not in (b"l", b"t", b"d", b"e"):
        raise CodecError(f"unknown tag {tag!r}")
    items = []
    for _ in range(2 * count if tag == b"d" else count):
        item, at = _read(data, at, depth + 1, hashing)
        items.append(item)
    if tag == b"l":
        return items, at
    if tag == b"t":
        return tuple(items), at
    pairs = list(zip(items[::2], items[1::2], strict=True)) if tag == b"d" else items
    if not hashing:
        return (Pairs if tag == b"d" else Members)(pairs), at
    try:
        return (dict if tag == b"d" else set)(pairs), at
    except TypeError:
        raise CodecError("an unhashable key or member") from None
