r"""Does an answer commit to a value? What a parser drops silently, and a grader must not.

Invariant: text alone; every rule compares with the ground truth, so what stands there may stand
in the answer: a relation other than "=" (5 is not "at least 5"), a hedge ("5, not sure"), an
operation left undone (\gcd(12,18)), a prime or an ellipsis.
"""

from __future__ import annotations

import re

from rewards.latex_text import GROUP

_LEADING = re.compile(
    r"\s*(?:[<>\u2264\u2265]|\\(?:[lg]eq?|[lg]eqslant|[lg]eqq|lt|gt|ll|gg)(?![a-z]))"
)
_RELATIONS = {
    "unequal": re.compile(r"\\neq?(?![a-z])|\\not\s*=|\\not(?![a-z])|!="),
    "negated": re.compile(r"\\(?:neg|lnot)(?![a-z])"),
    "congruent": re.compile(r"\\(?:equiv|cong)(?![a-z])"),
    "related": re.compile(r"\\(?:propto|sim|simeq|asymp)(?![a-z])"),
    "implied": re.compile(
        r"\\(?:(?:Long|long)?(?:left)?(?:[Rr]ightarrow)|(?:Long)?Leftrightarrow|implies|iff|to"
        r"|therefore|because|mapsto)(?![a-z])|[=-]>"
    ),
    "member": re.compile(r"\\(?:in|ni|notin)(?![a-z])\s*(?:[-+.\d]|[a-zA-Z]|\\frac)"),
}
_APPROXIMATE = re.compile(r"\\(?:approx|thickapprox|doteq|simeq)(?![a-z])")
_UNEVALUATED = {
    "sum": r"\\sum", "product": r"\\prod", "integral": r"\\i*int", "limit": r"\\lim",
    "gcd": r"\\gcd|\\operatorname\s*\{(?:gcd|lcm)\}|\\(?:text|mathrm)\s*\{\s*(?:gcd|lcm)\s*\}"
           r"|\\lcm|\\(?:max|min|sup|inf)",
    "determinant": r"\\det|\\begin\{vmatrix\}",
    "derivative": r"\\frac\s*\{\s*(?:d|\\mathrm\{d\}|\\partial)\s*\}"
                  r"\s*\{\s*(?:d|\\mathrm\{d\}|\\partial)",
    "remainder": r"\\bmod|\\mod",
}
_OPERATIONS = {name: re.compile(rf"(?:{p})(?![a-zA-Z])" if name != "derivative" else p)
               for name, p in _UNEVALUATED.items()}
_HEDGES = re.compile(
    r"\b(?:not|if|otherwise|else|unless|except|maybe|perhaps|possibly|probably|likely|wrong"
    r"|incorrect|unsure|could|might|but|alternatively|plus|minus|between|at (?:least|most)"
    r"|(?:less|more|greater|fewer|larger|smaller|bigger) than"
    r"|(?:or|and) (?:more|less|fewer|above|below|greater|higher|lower|nothing|none))\b"
)
_CASES = {"if", "otherwise", "else", "unless", "except"}
_RANGE = re.compile(r"\bto\b[\s}$(]*[-+.\\]?\d")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_NUMBER_IN_TEXT = re.compile(r"(?<![\w^.{/-])\d+(?:\.\d+)?")
_PRIME = re.compile(r"'(?![A-Za-z])|\\prime(?![a-z])")
_ELLIPSIS = re.compile(r"\\[lcvd]?dots[cbmio]?(?![a-z])|\.\.+")
_SET = re.compile(r"\\(?:cup|cap|setminus|mathbb|infty)(?![a-z])|[\[\]]")


def refuses(answer: str, truth: str) -> bool:
    """Does the answer say something that `truth` does not, and that changes what it claims?"""
    if _LEADING.match(answer) and not _LEADING.match(truth):
        return True
    for name, pattern in _RELATIONS.items():
        if pattern.search(answer) and not pattern.search(truth):
            if name == "unequal" and _SET.search(truth):
                continue  # x \ne 2, for (-\infty,2)\cup(2,\infty)
            if name == "congruent" and "mod" in truth:
                continue
            return True
    for pattern in _OPERATIONS.values():
        if pattern.search(answer) and not pattern.search(truth):
            return True
    return hedges(answer, truth) or _marks(answer) != _marks(truth)


def evaluated(answer: str) -> str:
    r"""The last side of `\int_0^1 x^2 dx = \frac{1}{3}`: it names its value."""
    head, equals, value = answer.rpartition("=")
    undone = [p for p in _OPERATIONS.values() if p.search(head)]
    if equals and undone and not any(p.search(value) for p in undone):
        return value.strip()
    return answer


def unnamed(answer: str, truth: str) -> tuple[str, str]:
    r"""Without the name before "=" where only one of the two has one: f'(x)=2x and 2x."""
    named = re.compile(r"\s*(?:[a-zA-Z]'*(?:\s*\([a-z]\))?|\\frac\{d[a-z]\}\{d[a-z]\})\s*=(?!=)")
    if "=" not in truth and answer.count("=") == 1:
        answer = named.sub("", answer, count=1) if named.match(answer) else answer
    elif "=" not in answer and truth.count("=") == 1:
        truth = named.sub("", truth, count=1) if named.match(truth) else truth
    return answer, truth


def approximations(answer: str, truth: str) -> list[str] | None:
    r"""The sides of a \approx b; None without \approx, or where the truth has it too; empty where
    "about 5" is no answer because the truth is exact."""
    if not _APPROXIMATE.search(answer) or _APPROXIMATE.search(truth):
        return None
    sides = [side.strip() for side in _APPROXIMATE.split(answer)]
    if not sides[0] or re.fullmatch(r"[A-Za-z](?:_\{?\w\}?)?\s*=?", sides[0]):
        return sides[1:] if re.search(r"\d\.\d", truth) and len(sides) == 2 else []
    return sides if all(sides) else []


def hedges(answer: str, truth: str) -> bool:
    """Does the answer take back, in words, what it says?"""
    said, expected = _words(answer), _words(truth)
    for match in _HEDGES.finditer(said):
        by_cases = match.group() in _CASES and "cases" in answer and "cases" in truth
        if match.group() not in expected and not by_cases:
            return True
    if _RANGE.search(said) and ":" not in truth and " to " not in expected:
        return True
    expected_numbers = set(_NUMBER_IN_TEXT.findall(truth))
    return any(
        set(_NUMBER_IN_TEXT.findall(content)) - expected_numbers
        for content in GROUP.findall(answer)
    )


def _words(text: str) -> str:
    return " ".join(_COMMAND.sub(" ", text).lower().split())


def _marks(text: str) -> tuple[int, bool]:
    """The number of primes and whether something is left out by dots."""
    bare = GROUP.sub(" ", text)
    return len(_PRIME.findall(bare)), bool(_ELLIPSIS.search(bare))
