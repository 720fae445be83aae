r"""Equality that needs computer algebra: math-verify's comparison, corrected where it errs.

Invariant: runs only in a killable process; nothing here has a time limit of its own. Corrections,
each with pairs in the agreement table: a set is not a tuple; units convert or differ; "or" between
inequalities is a union; i is the imaginary unit on both sides; a sum, product, integral or limit
left standing is no answer to a question whose ground truth is free of them.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from rewards.exact_answer import compare_exactly
from rewards.units import rescale, split_unit

_UNEVALUATED = re.compile(r"\\(?:sum|prod|i*int|lim)(?![a-z])")
_REWRITE = (
    (re.compile(r"\\varnothing|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"^\s*[a-zA-Z]\s*\\in(?![a-z])"), ""),
    (re.compile(r"\\cfrac"), r"\\frac"),
)
_OR = re.compile(r"\\(?:text|mathrm)\s*\{\s*or\s*\}|\\lor(?![a-z])|\bor\b")
_INEQUALITY = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt)(?![a-z])")


@lru_cache(maxsize=1024)  # a group's wrong answers are often the same
def algebra_agrees(answer: str, truth: str) -> bool:
    """Is `answer` the value `truth`, however it is written?"""
    if _UNEVALUATED.search(answer) and not _UNEVALUATED.search(truth):
        return False
    answer, unit = split_unit(answer)
    truth, true_unit = split_unit(truth)
    if unit and true_unit:
        if unit.dimension != true_unit.dimension:
            return False
        answer = rescale(answer, unit, true_unit)
    if unit or true_unit:
        exactly = compare_exactly(answer, truth)
        if exactly is not None:
            return exactly
    if {_delimiter(answer), _delimiter(truth)} == {"set", "tuple"}:
        return False
    return _parsed_agree(answer, truth)


def expressions(text: str) -> tuple[Any, ...]:
    """What the parser makes of an answer; empty where it finds no expression."""
    for pattern, replacement in _REWRITE:
        text = pattern.sub(replacement, text)
    if _OR.search(text) and _INEQUALITY.search(text):
        union = _union(_OR.split(text))
        if union is not None:
            return (union,)
    return _parse(text)


def _parsed_agree(answer: str, truth: str) -> bool:
    from math_verify import verify

    gold, found = expressions(truth), expressions(answer)
    return bool(gold and found) and verify(
        list(gold), list(found), timeout_seconds=None, allow_set_relation_comp=True
    )


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


def _union(pieces: list[str]) -> Any | None:
    """The set of all x that satisfy one of the relations; None where they are not relations."""
    import sympy

    sets = []
    for piece in pieces:
        found = _parse(piece.strip(" ,"))
        relation = found[0] if found else None
        if not isinstance(relation, sympy.logic.boolalg.Boolean):
            return None
        sets.append(relation.as_set())
    return sympy.Union(*sets)


def _delimiter(text: str) -> str:
    """Whether the whole is written as a set or as a tuple of several elements."""
    text = text.replace("\\left", "").replace("\\right", "").strip(" .$")
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if text.startswith("(") and text.endswith(")") and "," in text and "(" not in text[1:]:
        return "tuple"
    return ""
