r"""A number and the unit behind it, so that 5 cm is not 5 m, and 2 m is 200 cm.

Invariant: only a trailing \text{} (or \mathrm{}), a degree sign, a currency before the number, or
a word that cannot be a product of variables (`5 hours`, but not `5m`) is split off. Scale words
(million, dozen) belong to the number; two numbers with units of one dimension add up. A unit
missing on one side is no difference; a known unit against another word is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.exact_answer import normalise, rational
from rewards.unit_table import SCALES, Unit, look_up, parse_unit


@dataclass(frozen=True, slots=True)
class Quantity:
    """Example: `1.5\\text{ million dollars}` is Quantity("1500000", dollar, "")."""

    value: str
    unit: Unit | None = None
    words: str = ""  # what stood behind the number and is no unit we know: "apples"


_TEXT = r"\\(?:text|mathrm|textrm|textbf|textit|mathbf|mbox|operatorname)\s*"
_GROUP = _TEXT + r"\{(?:[^{}]|\{[^{}]{0,9}\}){0,80}\}"
_POWER = r"\^(?:\{-?\d\}|\d)"
_DEGREE = r"(?:\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![a-z])|\u00b0)"
_GLUE = r"\\(?:cdot|times)(?![a-z])|\\[,;:! ]|[\s~/*.\u00b7]"
_TAIL = re.compile(rf"(?:{_GLUE}|\\mu(?![a-z])|\\Omega(?![a-z])|{_GROUP}|{_POWER})+")
_TAIL_START = re.compile(rf"(?:(?:{_GLUE})*\\(?:mu|Omega)(?![a-z])|(?:{_GLUE})*{_GROUP})")
_FRACTION_TAIL = re.compile(rf"(?:\\[,;:! ]|[\s~])*\\frac\s*\{{({_GROUP})\}}\{{({_GROUP})\}}\.?$")
_PLAIN_TAIL = re.compile(
    r"(?:\\[,; ]|\s|~)*(?P<words>[A-Za-z][A-Za-z/ ]{1,40}(?:\^\{?[23]\}?)?)\.?"
)
_DEGREE_TAIL = re.compile(rf"\s*{_DEGREE}\s*(?:\\[,; ]\s*)?(?P<scale>{_GROUP}|[CF])?\.?")
_NUMBER = re.compile(r"(?:[-+\d.,/{}\s]|\\[dt]?frac|\\[,!])+")
_CURRENCY = re.compile(
    r"\s*(\\?\$|\\(?:euro|pounds|EUR)(?![a-z])|[\u20ac\u00a3\u00a5\u20b9])\s*(?=[\d.])"
)
_CURRENCIES = {"\\pounds": "\u00a3", "\\euro": "eur", "\\EUR": "eur", "$": "usd", "\\$": "usd"}
_PART = rf"\d[\d,./]{{0,12}}\s*(?:(?:{_GLUE})*{_GROUP}|[A-Za-z]{{1,12}})"
_COMPOUND = re.compile(
    rf"({_PART})(?:{_GLUE}|,|\\text\s*\{{\s*,?\s*(?:and)?\s*\}}|\band\b)*({_PART})"
)
_NEUTRAL = re.compile(r"(?:(?:square|sq|cubic)\s+)?units?(?:\s*\^\d)?", re.IGNORECASE)
_COPULA = re.compile(r"^(?:is|are)(?: an?)? ")
_CLAIM = re.compile(r"(?:is|are|must|not|even|odd|prime|divisible|a multiple)\b", re.IGNORECASE)
_DEGREE_UNIT, _RADIAN_UNIT = look_up("degree"), look_up("radian")
_UNWRAP = re.compile(_TEXT + r"\{((?:[^{}]|\{[^{}]*\})*)\}")


def quantity(text: str) -> Quantity:
    """The parts of an answer; `Quantity(text)` where there is nothing but a value."""
    text = text.strip()
    parts = _COMPOUND.fullmatch(text)
    if parts is not None:
        return _compound(quantity(parts[1]), quantity(parts[2])) or Quantity(text)
    money = _CURRENCY.match(text)
    if money and "$" not in text[money.end() :]:
        rest = quantity(text[money.end() :])
        symbol = money.group(1)
        unit = look_up(_CURRENCIES.get(symbol, symbol))
        if unit is not None and rest.unit is not None and rest.unit.dimension != unit.dimension:
            unit = unit.times(rest.unit)
        return Quantity(rest.value, unit)
    number = _NUMBER.match(text)
    split = number.end() if number else 0
    if split and (degree := _DEGREE_TAIL.fullmatch(text, split)) is not None:
        return Quantity(text[:split], parse_unit(f"degree {_words(degree.group('scale') or '')}"))
    fraction = _FRACTION_TAIL.search(text)
    if split and fraction is not None and fraction.start():
        return _quantity(text[: fraction.start()], f"{_words(fraction[1])}/{_words(fraction[2])}")
    start = _tail_start(text)
    words = _words(text[start:]) if start else ""
    if start and words.partition(" ")[0] not in ("or", "and"):
        return _quantity(text[:start], words)
    if split and (match := _PLAIN_TAIL.fullmatch(text, split)) is not None:
        found = _quantity(text[:split], _words(match.group("words")), plain=True)
        return Quantity(text) if found.words else found
    return Quantity(text)


def _compound(first: Quantity, second: Quantity) -> Quantity | None:
    """3 hours 30 minutes, in the larger unit; None where the two do not add up."""
    whole, rest = (rational(normalise(part.value)) for part in (first, second))
    if whole is None or rest is None or first.unit is None or second.unit is None:
        return None
    ratio = second.unit.factor / first.unit.factor
    if first.unit.dimension != second.unit.dimension or ratio >= 1:
        return None
    return Quantity(str(whole + rest * ratio), first.unit)


def same_kind(answer: Quantity, truth: Quantity) -> bool:
    """Could the two be equal, as far as what stands behind the numbers goes?"""
    if answer.unit and truth.unit:
        angles = {answer.unit, truth.unit} == {_DEGREE_UNIT, _RADIAN_UNIT}
        return angles or answer.unit.dimension == truth.unit.dimension
    if _another_claim(answer, truth):
        return False
    if (answer.unit and truth.words) or (truth.unit and answer.words):
        return False
    percent = [bool(re.search(r"%\s*$", side.value)) for side in (answer, truth)]
    return percent[0] == percent[1] or not any(
        side.unit or side.words
        for side, is_percent in zip((answer, truth), percent, strict=True)
        if not is_percent
    ) and not any(
        side.unit for side, is_percent in zip((answer, truth), percent, strict=True) if is_percent
    )


def _another_claim(answer: Quantity, truth: Quantity) -> bool:
    r"""n\text{ is even} beside n\text{ is odd}: what is said of a symbol is the answer."""
    said, meant = (_COPULA.sub("", side.words.lower()) for side in (answer, truth))
    if said == meant or any(character.isdigit() for character in truth.value):
        return False
    return bool(said and meant) or any(_CLAIM.match(side.words) for side in (answer, truth))


def in_unit_of(answer: Quantity, truth: Quantity) -> str:
    r"""The answer's value as an expression in the truth's unit. A multiple of \pi that has no unit
    is an angle in radians where the other is in degrees."""
    angles = [_angle(side, other) for side, other in ((answer, truth), (truth, answer))]
    if angles == ["radian", "degree"]:
        return f"\\frac{{180}}{{\\pi}}({answer.value})"
    if angles == ["degree", "radian"]:
        return f"\\frac{{\\pi}}{{180}}({answer.value})"
    if answer.unit and truth.unit:
        return _scaled(answer.value, answer.unit.factor / truth.unit.factor)
    return answer.value


def _angle(side: Quantity, other: Quantity) -> str:
    if side.unit in (_DEGREE_UNIT, _RADIAN_UNIT):
        return "degree" if side.unit == _DEGREE_UNIT else "radian"
    is_bare = side.unit is None and not side.words and other.unit == _DEGREE_UNIT
    return "radian" if is_bare and "\\pi" in side.value else ""


def _scaled(value: str, factor: Fraction) -> str:
    if factor == 1:
        return value
    number = rational(normalise(value))
    if number is not None:
        return str(number * factor)
    return f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}({value})"


def _quantity(value: str, words: str, plain: bool = False) -> Quantity:
    names = words.split()
    scale = Fraction(1)
    while names and names[0].lower().removesuffix("s") in SCALES:
        scale *= SCALES[names.pop(0).lower().removesuffix("s")]
    if names == ["k"] and not plain:
        scale, names = scale * 1000, []
    value, words = _scaled(value.strip(), scale), " ".join(names)
    if not words or _NEUTRAL.fullmatch(words):
        return Quantity(value)
    unit = parse_unit(words, plain)
    if unit is None and len(names) > 1 and not plain:  # "cm long", "consecutive days"
        known = [look_up(name) for name in (names[0], names[-1]) if len(name) > 2 or name == "cm"]
        unit = next((found for found in known if found is not None), None)
    return Quantity(value, unit) if unit is not None else Quantity(value, None, words)


def _tail_start(text: str) -> int:
    """Where a trailing run of \\text{...} begins, blanks before it included; 0 without one."""
    for match in _TAIL_START.finditer(text, max(0, len(text) - 300)):
        if match.start() and _TAIL.fullmatch(text, match.start()):
            return match.start()
    return 0


def _words(tail: str) -> str:
    """`\\,\\text{ kg}\\cdot\\text{m/s}^2` as "kg*m/s^2"."""
    tail = re.sub(r"\\(?:cdot|times)(?![a-z])|\u00b7", "*", tail)
    tail = tail.replace("\\mu", "u").replace("\\Omega", "ohm").replace("\u00b5", "u")
    tail = re.sub(r"\\[,;:! ]|~", " ", _UNWRAP.sub(r"\1", tail))
    tail = re.sub(r"\^\{(-?\d)\}", r"^\1", tail).replace("\u03bc", "u").replace("\u03a9", "ohm")
    tail = re.sub(r"\s*([*/^])\s*", r"\1", tail)
    tail = re.sub(r"[.,;:!]", "", tail)
    return " ".join(tail.strip(" ()*").split())
