r"""What can be said of two answers without a computer algebra system: most of what models write.

Invariant: bounded work (no power is ever evaluated, numbers have at most MAX_NUMBER_CHARS), and
`None` wherever the two might still be equal for a reason that only algebra sees.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_NUMBER_CHARS = 60

_DELETE = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:> ]|\\q?quad|\\displaystyle|\\limits|[$~\u00a0]"
)
_REWRITE = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:le|leqslant)(?![a-z])"), r"\\leq"),
    (re.compile(r"\\(?:ge|geqslant)(?![a-z])"), r"\\geq"),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) "), ""),
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_RATIO = re.compile(r"([+-]?\d+)/(\d+)")
_FRAC = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{(\d+)\}")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{?(\d+)\}?")
_PERCENT = re.compile(r"(.+?) ?(?:\\?%|percent|pct)")
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")
_IN_BASE = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")


def compare_exactly(answer: str, truth: str) -> bool | None:
    """True or False where strings or plain rational numbers decide it, else None."""
    answer, truth = normalise(answer), normalise(truth)
    if answer == truth and answer:
        return True
    if _are_names(answer) and _are_names(truth):
        return False  # to a parser, "stop" and "pots" are the same product of letters
    digits, base = _in_base(answer)
    true_digits, true_base = _in_base(truth)
    if base or true_base:
        return digits == true_digits and (base == true_base or not (base and true_base))
    values, percent = _values(answer)
    true_values, true_percent = _values(truth)
    if not values or not true_values:
        return None
    if percent == true_percent:
        values, true_values = values[:1], true_values[:1]
    exact = "." not in answer + truth
    return any(numbers_agree(left, right, exact) for left in values for right in true_values)


def normalise(text: str) -> str:
    """One spelling for what LaTeX spells in several ways without changing the value."""
    text = _DELETE.sub("", text.strip())
    for pattern, replacement in _REWRITE:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".")
    return text.lower() if _WORDS.fullmatch(text) else text


def rational(text: str) -> Fraction | None:
    """The value of an integer, a decimal (also repeating), a/b or \\frac{a}{b}; else None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if (repeating := _REPEATING.fullmatch(text)) is not None:
        return _repeating(*repeating.groups())
    if (ratio := _RATIO.fullmatch(text)) is not None:
        sign, above, below = "", *ratio.groups()
    elif (frac := _FRAC.fullmatch(text)) is not None:
        sign, above, below = frac.groups()
    else:
        return None
    if int(below) == 0:
        return None
    value = Fraction(int(above), int(below))
    return -value if sign == "-" else value


def _are_names(text: str) -> bool:
    """One letter, or words too long to be a product of variables."""
    return (len(text) == 1 and text.isalpha()) or (len(text) > 3 and bool(_WORDS.fullmatch(text)))


def _repeating(sign: str, whole: str, fixed: str, period: str) -> Fraction:
    value = Fraction(int((whole + fixed) or 0), 10 ** len(fixed))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    return -value if sign == "-" else value


def _values(text: str) -> tuple[list[Fraction], bool]:
    """What a number may stand for, and whether it is a percentage: 50% is 50, or 0.5."""
    percent = _PERCENT.fullmatch(text)
    value = rational(percent.group(1) if percent else text)
    if value is None:
        return [], percent is not None
    return [value, value / 100] if percent else [value], percent is not None


def _in_base(text: str) -> tuple[str, str]:
    """Digits and base of 1011_2; base "" for anything else."""
    match = _IN_BASE.fullmatch(text)
    return match.groups() if match else (text, "")


def numbers_agree(left: Fraction, right: Fraction, exact: bool) -> bool:
    """Equal; a decimal may also be the other's value rounded to six places (1/3 and 0.333333)."""
    if left == right:
        return True
    if exact or round(left, 6) != round(right, 6):
        return False
    return abs(left - right) <= Fraction(1, 1000) * max(abs(left), abs(right))
