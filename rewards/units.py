r"""A number and the unit behind it, so that 5 cm is not 5 m, and 2 m is 200 cm.

Invariant: only units that the table knows are split off, and a single letter counts only inside
\text{} or \mathrm{} (elsewhere `5m` is five times m). Everything else is left as it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.exact_answer import normalise, rational


@dataclass(frozen=True, slots=True)
class Unit:
    dimension: tuple[str, int]  # ("length", 2) is an area
    factor: Fraction  # in base units of that dimension


_NAMES = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100",
        "m meter metre": "1", "km kilometer kilometre": "1000", "in inch inches": "0.0254",
        "ft foot feet": "0.3048", "yd yard": "0.9144", "mi mile": "1609.344",
    },
    "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000"},
    "time": {
        "s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400",
        "week": "604800",
    },
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "speed": {"m/s": "1", "km/h kmh kph": "5/18", "mph": "0.44704"},
    "money": {"dollar usd": "1", "cent": "1/100"},
    "angle": {"degree deg": "1"},
    "radians": {"radian rad": "1"},  # degrees by way of pi: told apart, not converted
}
_TABLE = {
    name: (dimension, Fraction(factor))
    for dimension, units in _NAMES.items()
    for names, factor in units.items()
    for name in names.split()
}
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3}
_WRAPPED = re.compile(
    r"(?:\\[,; ]|\s|~)*\\(?:text|mathrm|textrm|mbox)\s*\{(?P<unit>[^{}]{1,40})\}"
    r"(?:\^\{?(?P<power>[23])\}?)?\.?"
)
_PLAIN = re.compile(
    r"(?:\\[,; ]|\s|~)*(?P<unit>[A-Za-z][A-Za-z/ ]{1,40})(?:\^\{?(?P<power>[23])\}?)?\.?"
)
_DEGREE = re.compile(r"\s*(?:\^\{?\\circ\}?|°)")
_MONEY = re.compile(r"\\?\$\s*(?=[\d.])")


def split_unit(text: str) -> tuple[str, Unit | None]:
    """("5", centimetre) of "5 \\text{ cm}"; (text, None) where there is no unit we know."""
    text = text.strip()
    money = _MONEY.match(text)
    if money and "$" not in text[money.end() :]:
        return text[money.end() :], Unit(("money", 1), Fraction(1))
    number = re.match(r"(?:[-+\d.,/{}\s]|\\[dt]?frac|\\[,!])+", text)
    split = number.end() if number else 0
    if split and _DEGREE.fullmatch(text, split):
        return text[:split], Unit(("angle", 1), Fraction(1))
    for pattern in (_WRAPPED, _PLAIN):
        start = _wrapped_start(text) if pattern is _WRAPPED else split
        match = pattern.fullmatch(text, start) if start else None
        unit = _look_up(match.group("unit"), match.group("power")) if match else None
        if unit is not None:
            return text[:start].strip(), unit
    return text, None


def rescale(value: str, unit: Unit, target: Unit) -> str:
    """`value`, given in `unit`, as an expression in `target`."""
    factor = unit.factor / target.factor
    if factor == 1:
        return value
    number = rational(normalise(value))
    if number is not None:
        return str(number * factor)
    return f"\\frac{{{factor.numerator}}}{{{factor.denominator}}}({value})"


def _wrapped_start(text: str) -> int:
    """Where a trailing \\text{...} begins, blanks before it included."""
    start = max(text.rfind(command) for command in ("\\text{", "\\mathrm{", "\\textrm{", "\\mbox{",
                                                    "\\text {", "\\mathrm {"))
    while start > 0 and text[start - 1] in " ~,;\\" and text[start - 2 : start] != "\\\\":
        start -= 1
    return max(start, 0)


def _look_up(words: str, power: str | None) -> Unit | None:
    *before, name = words.lower().replace(".", "").split() or [""]
    exponent = int(power or 1)
    for word in before:
        if word not in _POWER_WORDS:
            return None
        exponent *= _POWER_WORDS[word]
    found = _TABLE.get(name) or _TABLE.get(name.removesuffix("s"))
    if found is None:
        return None
    dimension, factor = found
    return Unit((dimension, exponent), factor**exponent)
