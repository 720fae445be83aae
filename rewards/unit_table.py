r"""Units of measurement: what dimension a name stands for and how large it is.

Invariant: pure data and look-ups. Symbols are case-sensitive (mW is not MW, Mg is not mg), words
are not; SI prefixes are generated. Dimensions are powers of base units, so that N and kg m/s^2
agree and N and J do not. Currencies, degrees, radians and the two everyday temperature scales are
bases of their own: told apart, not converted here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache


@dataclass(frozen=True, slots=True)
class Unit:
    """Example: km/h is Unit((("m", 1), ("s", -1)), Fraction(5, 18))."""

    dimension: tuple[tuple[str, int], ...]  # (base unit, power), sorted, no power 0
    factor: Fraction  # in base units

    def times(self, other: Unit, power: int = 1) -> Unit:
        powers = dict(self.dimension)
        for base, exponent in other.dimension:
            powers[base] = powers.get(base, 0) + exponent * power
        dimension = tuple(sorted((base, p) for base, p in powers.items() if p))
        return Unit(dimension, self.factor * other.factor**power)


ONE = Unit((), Fraction(1))
SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12,
}
# symbol, name(s), factor in base units, base units; all of these take SI prefixes
_PREFIXED = """
m meter,metre 1 m | g gram 1/1 g | s second 1 s | A ampere,amp 1 A | K kelvin 1 K | mol mole 1 mol
Hz hertz 1 s-1 | N newton 1000 g,m,s-2 | Pa pascal 1000 g,m-1,s-2 | J joule 1000 g,m2,s-2
W watt 1000 g,m2,s-3 | C coulomb 1 A,s | V volt 1000 g,m2,s-3,A-1 | F farad 1/1000 g-1,m-2,s4,A2
ohm ohm 1000 g,m2,s-3,A-2 | T tesla 1000 g,s-2,A-1 | H henry,henrie 1000 g,m2,s-2,A-2
Wb weber 1000 g,m2,s-2,A-1 | L liter,litre 1/1000 m3 | l liter 1/1000 m3 | M molar 1000 mol,m-3
eV electronvolt 1.602176634e-16 g,m2,s-2 | Wh watthour 3600000 g,m2,s-2
cal calorie 4184 g,m2,s-2 | Bq becquerel 1 decay,s-1 | bar bar 100000000 g,m-1,s-2 | B byte 8 bit
"""
_OTHERS = """
in,inch,inche 0.0254 m | ft,foot,feet 0.3048 m | yd,yard 0.9144 m | mi,mile 1609.344 m
lb,pound 453.59237 g | oz,ounce 28.349523125 g | ton,tonne 1000000 g
sec 1 s | min,minute 60 s | h,hr,hour 3600 s | day 86400 s | week 604800 s
month 2629800 s | yr,year 31557600 s | decade 315576000 s | century,centurie 3155760000 s
gal,gallon 0.003785411784 m3 | qt,quart 0.000946352946 m3 | pint 0.000473176473 m3 | cc 1/1000000 m3
kmh,kph 5/18 m,s-1 | mph 0.44704 m,s-1 | acre 4046.8564224 m2 | hectare 10000 m2 | bit 1 bit
dollar,usd 1 USD | cent 1/100 USD | euro,eur,€ 1 EUR | £,gbp 1 GBP | yen,jpy,¥ 1 JPY
rupee,inr,₹ 1 INR | yuan,cny,rmb 1 CNY
degree,deg 1 degree | radian,rad 1 radian | celsius 1 celsius | fahrenheit 1 fahrenheit
atm 101325000 g,m-1,s-2 | rpm 1/60 turn,s-1 | revolution 1 turn
"""
_PREFIXES = {
    "f": ("femto", "1e-15"), "p": ("pico", "1e-12"), "n": ("nano", "1e-9"),
    "u": ("micro", "1e-6"), "m": ("milli", "1e-3"), "c": ("centi", "1e-2"),
    "d": ("deci", "1e-1"), "k": ("kilo", "1e3"), "M": ("mega", "1e6"), "G": ("giga", "1e9"),
    "T": ("tera", "1e12"),
}
# Two letters and no \text{} around them: these are units, the others products of variables.
_PLAIN_SYMBOLS = frozenset("mm cm km in ft yd mi mg kg ml mL hr lb oz Hz kHz MHz kJ kW kPa".split())
_POWER_WORDS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cubed": 3}
_FACTOR = re.compile(r"(?P<name>[^\d^/* ()-]+)(?:\^?\(?(?P<power>-?\d)\)?)?")


def parse_unit(words: str, plain: bool = False) -> Unit | None:
    """The unit called "cm", "square feet", "kg*m/s^2" or "miles per hour"; None if unknown.

    `plain` says that the words stood outside \\text{}, where short symbols may be variables."""
    over = re.split(r"/|\bper\b", words)
    found = ONE
    for index, part in enumerate(over):
        if not part.strip() and index == 0 and len(over) > 1:
            continue  # "per hour"
        unit = _product(part, plain)
        if unit is None:
            return None
        found = found.times(unit, -1 if index else 1)
    return found if found.dimension else None


def _product(part: str, plain: bool) -> Unit | None:
    found, power, last = ONE, 1, None
    tokens = re.sub(r"[*()]|(?<=[A-Za-z])-(?=[A-Za-z])", " ", part).split()
    for token in _joined_degrees(tokens):
        if token.lower() in _POWER_WORDS:
            exponent = _POWER_WORDS[token.lower()]
            if token.lower().endswith("ed") and last is not None:
                found = found.times(last, exponent - 1)
            else:
                power = exponent
            continue
        match = _FACTOR.fullmatch(token)
        last = look_up(match.group("name"), plain) if match else None
        if match is None or last is None:
            return None
        found = found.times(last, power * int(match.group("power") or 1))
        power = 1
    return found if found.dimension and power == 1 else None


def _joined_degrees(tokens: list[str]) -> list[str]:
    """"degree C" and "degrees Celsius" as one name."""
    joined: list[str] = []
    scales = {"c": "celsius", "celsius": "celsius", "f": "fahrenheit", "fahrenheit": "fahrenheit"}
    for token in tokens:
        if joined and joined[-1].lower() in {"degree", "degrees"} and token.lower() in scales:
            joined[-1] = scales[token.lower()]
        else:
            joined.append(token)
    return joined


def look_up(name: str, plain: bool = False) -> Unit | None:
    symbols, words = _table()
    if name in symbols and (not plain or name in _PLAIN_SYMBOLS):
        return symbols[name]
    lower = name.lower()
    for candidate in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if candidate in words and (len(candidate) > 2 or not plain or lower in _PLAIN_SYMBOLS):
            return words[candidate]
    return None if plain else symbols.get(lower)


@cache
def _table() -> tuple[dict[str, Unit], dict[str, Unit]]:
    """Case-sensitive symbols and lower-case names."""
    symbols: dict[str, Unit] = {}
    words: dict[str, Unit] = {}
    for entry in _entries(_PREFIXED):
        symbol, names, factor, dimension = entry.split()
        unit = Unit(_dimension(dimension), Fraction(factor))
        for short, (long, size) in {"": ("", "1"), **_PREFIXES}.items():
            scaled = Unit(unit.dimension, unit.factor * Fraction(size))
            symbols.setdefault(short + symbol, scaled)
            words |= {long + name: scaled for name in names.split(",")}
    for entry in _entries(_OTHERS):
        names, factor, dimension = entry.split()
        words |= {name: Unit(_dimension(dimension), Fraction(factor)) for name in names.split(",")}
    for name in words.keys() & symbols.keys() - {"bar", "ohm"}:
        symbols.pop(name)  # min, ft and cent are no milli-inch, femtotonne or centi-
    return symbols, words


def _entries(block: str) -> list[str]:
    return [entry.strip() for entry in re.split(r"[|\n]", block) if entry.strip()]


def _dimension(text: str) -> tuple[tuple[str, int], ...]:
    parts = (re.fullmatch(r"([A-Za-z]+)(-?\d*)", part) for part in text.split(","))
    return tuple(sorted((part.group(1), int(part.group(2) or 1)) for part in parts if part))
