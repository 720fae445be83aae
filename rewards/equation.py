r"""Is an equation an answer? `x = 5` names a value, `2x - 5 = 5` leaves it to be found.

Invariant: text alone. A side is what the value is called where it is a name (`quantity_name`) or
what the question itself asks for ("find $m + n$"); everything else is an expression, and has to
agree with the value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.quantity_name import is_name

MAX_QUESTION_CHARS = 20_000

_EQUALS = re.compile(r"(?<![<>!=:])=(?![=>])")
_OTHER_RELATION = re.compile(r"[<>]|!=|==|\\(?:not|neq?|leq?|geq?|lt|gt|equiv|in|mid)(?![a-z])")
_BETWEEN = re.compile(
    r"[,;]|\\\\|\\q?quad(?![a-z])|\\text\s*\{\s*(?:or|and)\s*\}|\\l(?:or|and)(?![a-z])"
    r"|\b(?:or|and)\b"
)
_ASKS = re.compile(
    r"\b(?:find|compute|determine|calculate|evaluate|what\s+is|what\s+are|value\s+of|express"
    r"|give|submit|enter|report)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[^.?!\n]*(?:\.\d[^.?!\n]*)*[.?!\n]?")
_TOKEN = re.compile(r"\\begin(?![a-z])|\\end(?![a-z])|.", re.DOTALL)
_OPENING = frozenset({"(", "[", "{", "\\begin"})
_CLOSING = frozenset({")", "]", "}", "\\end"})
_IN_ORDER = ("xyz", "abcdef", "ABCDEF")
_SPACES = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|(?<=\\)[dt](?=frac)|\\[,;:! ]|[\s~$]+")


@dataclass(frozen=True, slots=True)
class Equation:
    """Example: `x = 2 + 3 = 5` is Equation(value="5", others=("2 + 3",), names=("x",))."""

    value: str
    others: tuple[str, ...]  # sides that are no names
    names: tuple[str, ...]


def equations(answer: str, question: str) -> list[Equation]:
    """The elements of an answer as equations, a bare value being one without names; none where
    nothing is equated or another relation stands too."""
    text = _without_brackets(answer)
    if not _EQUALS.search(text) or _OTHER_RELATION.search(_outermost(text)):
        return []
    asked = _asked(question)
    return [_equation(_split(piece, _EQUALS), asked) for piece in _split(text, _BETWEEN)]


def as_tuple(text: str) -> str | None:
    """`y = 1, x = 2` as (2, 1), since there is (x, y); other names in the order written. None for
    what does not name several values."""
    found = equations(text, "")
    if len(found) < 2 or any(len(e.names) != 1 or e.others for e in found):
        return None
    if len({e.names for e in found}) < len(found):
        return None
    if any({e.names[0] for e in found} <= set(letters) for letters in _IN_ORDER):
        found.sort(key=lambda equation: equation.names)
    return f"({', '.join(equation.value for equation in found)})"


def _is_called(side: str, asked: str) -> bool:
    """Is this side what the value is called, rather than something to be solved?"""
    return bool(side) and (is_name(side) or _is_asked(side, asked))


def _equation(sides: list[str], asked: str) -> Equation:
    names = tuple(side for side in sides if _is_called(side, asked))
    others = [side for side in sides if side and side not in names]
    if not others:  # x = y, or a bare letter
        return Equation(sides[-1], (), tuple(sides[:-1]))
    return Equation(others[-1], tuple(others[:-1]), names)


def _asked(question: str) -> str:
    """The sentences of the question that ask for something, without spaces."""
    sentences = _SENTENCE.findall(question[-MAX_QUESTION_CHARS:])
    asking = (s[found.end() :] for s in sentences if (found := _ASKS.search(s)) is not None)
    return " ".join(_SPACES.sub("", s) for s in asking)


def _is_asked(side: str, asked: str) -> bool:
    """Does an asking sentence hold this expression, as a whole and equated with nothing?"""
    wanted = re.escape(_SPACES.sub("", side))
    whole = rf"(?<![\d+\-*/^_(=]){wanted}(?!\w?[\d+\-*/^_=<>(]|\\(?:[lg]eq?|cdot|times))"
    return len(side) > 1 and re.search(whole, asked) is not None


def _without_brackets(text: str) -> str:
    """`(x = 5)` and `\\{x = 5\\}` without what stands around the whole."""
    text = text.strip()
    for opening, closing in (("(", ")"), ("\\{", "\\}")):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and _is_balanced(inner):
            return inner.strip()
    return text


def _is_balanced(text: str) -> bool:
    return min(_depths(text), default=0) >= 0


def _depths(text: str) -> list[int]:
    """How many brackets and environments are open before each character."""
    depths: list[int] = []
    depth = 0
    for token in _TOKEN.findall(text):
        depth -= token in _CLOSING
        depths += [depth] * len(token)
        depth += token in _OPENING
    return depths


def _outermost(text: str) -> str:
    """What stands outside every bracket."""
    return "".join(c for c, depth in zip(text, _depths(text), strict=True) if depth == 0)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The pieces between separators that stand outside every bracket."""
    depths, pieces, start = _depths(text), [], 0
    for match in separator.finditer(text):
        if depths[match.start()] == 0:
            pieces.append(text[start : match.start()].strip(" $"))
            start = match.end()
    return [*pieces, text[start:].strip(" $")]
