r"""Equality that needs computer algebra: math-verify's comparison, corrected where it errs.

Invariant: runs only in a killable process; nothing here has a time limit of its own. Corrections,
each with pairs in the agreement table: what the parser would drop in silence is refused first
(`commitment`); a set is not a tuple; units convert or differ; "or" between inequalities is a
union; i is the imaginary unit on both sides; an inequality left unsolved is no solution set, and
an equation left unsolved (`equation`) no value.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.commitment import approximations, evaluated, hedges, refuses, unnamed
from rewards.condition import without_conditions
from rewards.congruence import congruences_agree
from rewards.equation import Equation, as_tuple, equations
from rewards.exact_answer import compare_values, decimal_places, normalise, rational
from rewards.ratio import ratios_agree
from rewards.spelling import both_signs, open_words, respell
from rewards.units import in_unit_of, quantity, same_kind

_TRIG = r"\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*(?:\d|\{\d\}))?"
_INTERVAL = r"[(\[][^()\[\],]{1,60},[^()\[\],]{1,60}[)\]]"
_REWRITE: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"\\varnothing|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"^\s*[a-zA-Z]?\s*\\in(?![a-z])"), ""),
    (re.compile(r"\s*([<>])\s*"), r"\1"),
    (re.compile(r"\\(?:operatorname|mathrm|text)\s*\{\s*cis\s*\}\s*[({]?([^(){}]{1,40})[)}]?"),
     r"(\\cos(\1)+i\\sin(\1))"),
    (re.compile(rf"({_TRIG})\s*[({{]?\s*(\d+(?:\.\d+)?)\s*\^\s*\{{?\\circ\}}?\s*[)}}]?"),
     r"\1(\\frac{\2\\pi}{180})"),
    (re.compile(r"\^\{\s*(-?\d*\.\d+)\s*\}"), lambda m: f"^{{{Fraction(m[1])}}}"),
    # the parser adds what is written side by side, as in a mixed number
    (re.compile(r"(?<![\w.^{\\])(\d+(?:\.\d+)?)\s*(?=\(|\\binom)"), r"\1\\cdot "),
    (re.compile(r"(\\binom\s*\{[^{}]*\}\s*\{[^{}]*\})\s*(?=\d|\(|\\frac|\\binom)"), r"\1\\cdot "),
    (re.compile(r"\)\s*(?=\([^(),]*\)|\\frac|\\binom)"), r")\\cdot "),
)
_JOINED = re.compile(
    r"\\(?:text|mathrm)\s*\{\s*(or|and)\s*\}|\b(or|and)\b", re.IGNORECASE
)
_BESIDE_BY = r"\s*(?:,|\\text\s*\{\s*(?:or|and)\s*\})\s*"
_BESIDE = re.compile(rf"([)\]]){_BESIDE_BY}([(\[])")
_INTERVALS = re.compile(rf"\s*{_INTERVAL}(?:{_BESIDE_BY}{_INTERVAL}){{1,5}}\s*")
_DESCENDS = re.compile(r"(>|\\(?:geq?|gt)(?![a-z]))")
_INEQUALITY = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")


@lru_cache(maxsize=1024)  # a group's wrong answers are often the same
def algebra_agrees(answer: str, truth: str, question: str = "") -> bool:
    """Is `answer` the value `truth`, however it is written? `question` says what is asked for."""
    bare = without_conditions(open_words(respell(answer)), open_words(respell(truth)))
    if bare is None:
        return False
    answer, truth = evaluated(bare[0]), bare[1]
    solved = answer if "=" in truth else _named_value(answer, question)
    if solved is None or hedges(answer, truth):
        return False
    answer, truth = unnamed(solved, truth)
    if "=" not in truth and ":" in truth:
        answer = re.sub(r"\\text\s*\{\s*to\s*\}", ":", answer)
    sides = approximations(answer, truth)
    if sides is not None:
        close = len(sides) < 2 or _is_rounding(sides[0], sides[1])
        return close and any(algebra_agrees(side, truth) for side in sides)
    same_residues = congruences_agree(answer, truth)
    if same_residues is not None:
        return same_residues
    return not refuses(answer, truth) and _quantities_agree(answer, truth)


def expressions(text: str) -> tuple[Any, ...]:
    """What the parser makes of an answer; empty where it finds no expression."""
    text = both_signs(open_words(respell(text)))
    for pattern, replacement in _REWRITE:
        text = pattern.sub(replacement, text)
    text = _united(text)
    if _INEQUALITY.search(text):
        text = text.replace("\\cup", "\\text{ or }")
        words = {(a or b).lower() for a, b in _JOINED.findall(text)}
        joined = _joined(text, words)
        return (joined,) if joined is not None else _parse(_ascending(text))
    return _parse(text)


def _named_value(answer: str, question: str) -> str | None:
    """The value out of `x = 5`, any other answer as it stands; None for what is left unsolved."""
    found = equations(answer, question)
    if not all(_is_solved(equation) for equation in found):
        return None
    return found[0].value if len(found) == 1 else answer


def _is_solved(equation: Equation) -> bool:
    """Every other side agrees with the value. In x = 2h = 6 an open one may stand between."""
    chain = len(equation.names) + len(equation.others) > 1
    return all(
        _quantities_agree(side, equation.value) or (chain and _is_open(side))
        for side in equation.others
    )


def _is_open(text: str) -> bool:
    """Does it hold a symbol that could be anything?"""
    return any(getattr(expression, "free_symbols", ()) for expression in expressions(text))


def _quantities_agree(answer: str, truth: str) -> bool:
    found, expected = quantity(answer), quantity(truth)
    if not same_kind(found, expected):
        return False
    value = in_unit_of(found, expected)
    exactly = compare_values(value, expected.value)
    if exactly is not None:
        return exactly
    in_proportion = ratios_agree(value, expected.value, _parsed_agree)
    if in_proportion is not None:
        return in_proportion
    value, other = _as_tuples(value, expected.value)
    if {_delimiter(value), _delimiter(other)} == {"set", "tuple"}:
        return False
    return _parsed_agree(value, other)


def _as_tuples(answer: str, truth: str) -> tuple[str, str]:
    """Beside a tuple, x = 1, y = 2 is one: to the parser it would have no order."""
    kinds = _delimiter(answer), _delimiter(truth)
    if kinds == ("tuple", ""):
        return answer, as_tuple(truth) or truth
    if kinds == ("", "tuple"):
        return as_tuple(answer) or answer, truth
    return answer, truth


def _parsed_agree(answer: str, truth: str) -> bool:
    from math_verify import verify

    gold, found = expressions(truth), expressions(answer)
    if not gold or not found or _is_undefined(gold[0]):
        return False
    if _is_unsolved(found[0]) and not _is_unsolved(gold[0]):
        return False
    for text, other in ((answer, gold), (truth, found)):
        rounded = _rounding(text, other[0])
        if rounded is not None:
            return rounded
    if gold[0] == found[0]:  # a < b < c it cannot compare with itself
        return True
    return verify(list(gold), list(found), timeout_seconds=None, allow_set_relation_comp=True)


def _rounding(decimal: str, exact: Any) -> bool | None:
    """Is `decimal`, a finite decimal, the number `exact` at its places? None if either is not."""
    decimal = normalise(decimal)
    places, value = decimal_places(decimal), rational(decimal)
    if places is None or value is None:
        return None
    number = _number(exact)
    if number is None:
        return None
    if abs(number - value) < Fraction(1, 10**40) * max(1, abs(value)):
        return True
    digits = str(abs(value * 10**places)).lstrip("0")
    return len(digits) >= 6 and abs(number - value) < Fraction(1, 10**places)


def _is_rounding(exact: str, decimal: str) -> bool:
    r"""Does the second side of \approx lie within one unit of its last place of the first?"""
    value, found = rational(normalise(decimal)), expressions(exact)
    number = _number(found[0]) if found else None
    if value is None or number is None:
        return False
    return abs(number - value) < Fraction(1, 10 ** (decimal_places(normalise(decimal)) or 0))


def _number(expression: Any) -> Fraction | None:
    """The value of a real number to 50 digits."""
    import sympy

    if not isinstance(expression, sympy.Expr) or not expression.is_number:
        return None
    value = expression.evalf(50)
    return Fraction(str(value)) if value.is_Float or value.is_Rational else None


@lru_cache(maxsize=256)  # a group's samples share their ground truth
def _parse(text: str) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time-outs are off
    found = parse(
        f"\\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return tuple(_with_imaginary_unit(expression) for expression in found)


def _with_imaginary_unit(expression: Any) -> Any:
    import sympy

    letters = [s for s in getattr(expression, "free_symbols", ()) if s.name == "i"]
    return expression.subs({letter: sympy.I for letter in letters}) if letters else expression


def _joined(text: str, words: set[str]) -> Any | None:
    """The set of all x that satisfy relations joined by a word, or by commas where no x satisfies
    them all (x < 2, x > 3); None where they are not relations."""
    import sympy

    if len(words) > 1 or not (words or "," in text):
        return None
    sets = []
    for piece in (_JOINED if words else re.compile(",")).sub("\0", text).split("\0"):
        found = _parse(piece.strip(" ,"))
        relation = found[0] if found else None
        if not isinstance(relation, sympy.logic.boolalg.Boolean) or _is_unsolved(relation):
            return None
        try:
            sets.append(relation.as_set())
        except (NotImplementedError, TypeError):  # of several letters, or of sets
            return None
    shared = sympy.Intersection(*sets)
    if not words and shared != sympy.EmptySet:
        return None
    return shared if words == {"and"} else sympy.Union(*sets)


def _united(text: str) -> str:
    r"""(-\infty, -1], [1, \infty) as a union: a list with an infinite end is none of points."""
    if "\\infty" not in text or not _INTERVALS.fullmatch(text):
        return text
    return _BESIDE.sub(r"\1\\cup \2", text)


def _ascending(text: str) -> str:
    """a > b > c as c < b < a; anything else as it stands."""
    sides = _DESCENDS.split(text)
    if len(sides) < 5 or _INEQUALITY.search("".join(sides[::2])):
        return text
    turned = ["<" if sign.strip() in {">", "\\gt"} else "\\leq " for sign in sides[1::2]]
    rest = zip(turned[::-1], sides[-3::-2], strict=True)
    return sides[-1] + "".join(sign + side for sign, side in rest)


def _is_undefined(expression: Any) -> bool:
    """A division by zero is no value, and so equal to none."""
    import sympy

    return isinstance(expression, sympy.Basic) and expression.has(sympy.zoo, sympy.nan)


def _is_unsolved(expression: Any) -> bool:
    """An inequality that does not compare a bare symbol with something free of it."""
    import sympy

    if not isinstance(expression, sympy.logic.boolalg.Boolean):
        return False
    relations = expression.atoms(sympy.core.relational.Relational)
    return any(not r.is_Equality and not _names_its_symbol(r) for r in relations)


def _names_its_symbol(relation: Any) -> bool:
    for side, other in ((relation.lhs, relation.rhs), (relation.rhs, relation.lhs)):
        if side.is_Symbol and side not in other.free_symbols:
            return True
    return False


def _delimiter(text: str) -> str:
    """Whether the whole is written as a set or as a tuple of several elements."""
    text = text.replace("\\left", "").replace("\\right", "").strip(" .$")
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if text.startswith("(") and text.endswith(")") and "," in text and "(" not in text[1:]:
        return "tuple"
    return ""
