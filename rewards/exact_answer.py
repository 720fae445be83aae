r"""What can be said of two answers without a computer algebra system: most of what models write.

Invariant: bounded work (no power is ever evaluated, numbers have at most MAX_NUMBER_CHARS), and
`None` wherever the two might still be equal for a reason that only algebra sees.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.label import unlabelled
from rewards.spelling import respell

MAX_NUMBER_CHARS = 60
MIN_ROUNDED_DIGITS = 6  # fewer significant digits are an approximation, not another spelling

_DELETE = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:> ]|\\q?quad|\\displaystyle|\\limits|[$~\u00a0]"
)
_REWRITE = (
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:le|leqslant)(?![a-z])"), r"\\leq"),
    (re.compile(r"\\(?:ge|geqslant)(?![a-z])"), r"\\geq"),
    (re.compile(r"\s+"), " "),
    (re.compile(r" (?![A-Za-z0-9])|(?<![A-Za-z0-9]) "), ""),
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\}| )\d{3})+(?:\.\d+)?")
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_RATIO = re.compile(r"([+-]?\d+)/(\d+)")
_FRAC = re.compile(r"([+-]?)\\frac\{([+-]?\d+)\}\{(\d+)\}")
_MIXED = re.compile(r"([+-]?)(\d+)(?: (\d+)/(\d+)| ?\\frac\{(\d+)\}\{(\d+)\})")
_RECURRING = re.compile(r"([+-]?)(\d*)\.(\d*?)(\d+?)\4{2,}(?:\\[lc]?dots|\.\.\.)")
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)(?:\\times|\\cdot|\*) ?10\^\{?([+-]?\d{1,2})\}?")
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\{?(\d+)\}?")
_PERCENT = re.compile(r"(.+?) ?(?:\\?%|percent|pct)")
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen twenty".split()
    )
}
_ARTICLE = re.compile(r"^(?:[Aa]n?|[Tt]he) (?=[A-Za-z]{3})")
_DECIMAL_COMMA = re.compile(r"[+-]?\d{1,6}(?:,(?:\d{1,2}|\d{4,9})|\{,\}(?:\d{1,2}|\d{4,9}))")
_IN_BASE = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")


def compare_exactly(answer: str, truth: str) -> bool | None:
    """True or False where strings or plain rational numbers decide it, else None."""
    return compare_values(*unlabelled(answer, truth))


def compare_values(answer: str, truth: str) -> bool | None:
    """The same for what has no label, or has one that counts."""
    if _DECIMAL_COMMA.fullmatch(answer.strip(" .$")) and _DECIMAL.fullmatch(truth.strip(" $")):
        answer = answer.replace("{,}", ".").replace(",", ".")  # 3,5 is no list beside 3.5
    answer, truth = normalise(answer), normalise(truth)
    if answer == truth and answer:
        return True
    if _are_names(answer) and _are_names(truth):
        return False  # to a parser, "stop" and "pots" are the same product of letters
    digits, base = _in_base(answer)
    true_digits, true_base = _in_base(truth)
    if base or true_base:
        return digits == true_digits and base in ("", true_base)
    values, percent = _values(answer)
    true_values, true_percent = _values(truth)
    if not values or not true_values:
        return None
    if percent == true_percent:
        values, true_values = values[:1], true_values[:1]
    elif abs(values[0]) <= 1 or abs(true_values[0]) <= 1:  # 0.5 is 50%, never 0.5%
        values, true_values = values[-1:], true_values[-1:]
    places = (decimal_places(answer), decimal_places(truth))
    return any(numbers_agree(left, right, places) for left in values for right in true_values)


def normalise(text: str) -> str:
    """One spelling for what LaTeX spells in several ways without changing the value."""
    text = _DELETE.sub("", respell(text))
    for pattern, replacement in _REWRITE:
        text = pattern.sub(replacement, text)
    text = _ARTICLE.sub("", re.sub(r"(?<!\.)\.$", "", text.strip()))
    if not _WORDS.fullmatch(text):
        return text
    return _NUMBER_WORDS.get(text.lower(), text.lower())


def rational(text: str) -> Fraction | None:
    """The value of an integer, a decimal (also repeating), a/b or \\frac{a}{b}; else None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "").replace(" ", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if "{,}" in text and _DECIMAL_COMMA.fullmatch(text):
        return Fraction(text.replace("{,}", "."))
    if (repeating := _REPEATING.fullmatch(text)) is not None:
        return _repeating(*repeating.groups())
    if (recurring := _RECURRING.fullmatch(text)) is not None:
        return _repeating(*recurring.groups())
    if (power := _SCIENTIFIC.fullmatch(text)) is not None:
        return Fraction(power[1]) * Fraction(10) ** int(power[2])
    if (mixed := _MIXED.fullmatch(text)) is not None:
        return _mixed(*(group for group in mixed.groups() if group is not None))
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


def is_number(text: str) -> bool:
    """A plain rational number or percentage."""
    return bool(_values(normalise(text))[0])


def _mixed(sign: str, whole: str, above: str, below: str) -> Fraction | None:
    if int(below) == 0:
        return None
    value = int(whole) + Fraction(int(above), int(below))
    return -value if sign == "-" else value


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


def decimal_places(text: str) -> int | None:
    """How many places a finite decimal is written with; None for every other form."""
    percent = _PERCENT.fullmatch(text)
    number = (percent.group(1) if percent else text).replace(",", "")
    if _DECIMAL.fullmatch(number) is None or "." not in number:
        return None
    return len(number.partition(".")[2]) + 2 * bool(percent)


def numbers_agree(
    left: Fraction, right: Fraction, places: tuple[int | None, int | None] = (None, None)
) -> bool:
    """Equal; or one is the other, which is no finite decimal, rounded to the places it is written
    with, six significant digits at least (1/3 and 0.333333)."""
    if left == right:
        return True
    (decimal, exact), digits = ((left, right), places[0])
    if digits is None:
        (decimal, exact), digits = ((right, left), places[1])
    if digits is None or None not in places or is_finite_decimal(exact):
        return False
    return is_rounded(decimal, exact, digits)


def is_finite_decimal(value: Fraction) -> bool:
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def is_rounded(decimal: Fraction, exact: Fraction, places: int) -> bool:
    """`decimal` is `exact` at `places` places, at least six of its digits significant."""
    significant = len(str(abs(decimal.numerator) * 10**places // decimal.denominator))
    return significant >= MIN_ROUNDED_DIGITS and round(exact, places) == decimal
