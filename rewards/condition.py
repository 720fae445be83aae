r"""What is said of a letter behind a formula: `2n+1` for `n \ge 0`, `k\pi` with `k \in \mathbb{Z}`.

Invariant: text alone; the letter stands in the formula, and what is said neither picks one value of
it nor bounds it from above, so that the formula is the answer. Where both sides say something, the
two have to be the same; an integer may have another letter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.latex_text import GROUP


@dataclass(frozen=True, slots=True)
class Condition:
    r"""Example: `n \ge 0` is Condition("n", "least", "0")."""

    letter: str
    kind: str  # as in _FORMS
    bound: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the letter counts something, by what is said or by convention."""
        return self.kind in {"integer", "natural", "least integer"} or self.letter in "ijklmn"


_START = re.compile(
    r"[,;(]|\\q?quad(?![a-z])|\\(?:text|mathrm|textrm|mbox)\s*\{|\s(?:for|where|with)\s|\\forall"
)
_NOISE = re.compile(r"\\[,;:! ]|\\q?quad(?![a-z])|[~$]|\\(?:left|right|big|Big)(?![a-z])")
_TRAILING = re.compile(r"(?:\\[,;:! ]|\\q?quad|[\s,;])+$")
_LEAD = re.compile(r"[\s,;(]*(?:(?:for|where|with|when|and|here)\b)?\s*")
_N = r"(?P<bound>-?\d+)"
_L = r"(?P<letter>[a-zA-Z])"
_IN = rf"{_L}\s*\\in\s*\\mathbb\s*"
_ALL = r"(?:\\forall|all|every|any|each|an?|some)"
_IS = r"(?:is\s+)?(?:an?\s+|any\s+)?(?:arbitrary\s+)?"
_WHOLE = r"(?:(?:non-?negative|nonnegative)\s+integers?|whole\s+numbers?)"
_FORMS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern), kind, bound)
    for pattern, kind, bound in (
        (rf"{_L}\s*(?:\\geq?|>=)\s*{_N}", "least", ""),
        (rf"{_N}\s*\\leq?\s*{_L}", "least", ""),
        (rf"{_L}\s*(?:>|\\gt)\s*{_N}", "above", ""),
        (rf"{_N}\s*(?:<|\\lt)\s*{_L}", "above", ""),
        (rf"{_L}\s*(?:\\neq?|\\not\s*=)\s*(?P<bound>\\pm\s*\d+|-?\d+)", "not", ""),
        (rf"(?:\||\\lvert\s*){_L}(?:\||\s*\\rvert)\s*(?:<|\\lt)\s*{_N}", "within", ""),
        (rf"{_IN}\{{?Z\}}?", "integer", ""),
        (rf"{_IN}\{{?R\}}?", "real", ""),
        (rf"{_IN}\{{?N\}}?", "natural", ""),
        (rf"{_IN}\{{?Z\}}?\s*(?:\^\s*\{{?\+\}}?|_\{{?>0\}}?)", "least integer", "1"),
        (rf"{_IN}\{{?N\}}?\s*\^\s*\{{?[+*]\}}?", "least integer", "1"),
        (rf"{_IN}\{{?[ZN]\}}?\s*_\s*\{{?(?:\\geq?\s*)?0\}}?", "least integer", "0"),
        (rf"{_L}\s*=\s*0\s*,\s*\\pm\s*1\s*,.{{0,20}}\\[lc]?dots", "integer", ""),
        (
            rf"{_L}\s*(?:=|\\in\s*\\\{{)\s*(?P<bound>[01])\s*,\s*[12]\s*,.{{0,20}}"
            r"(?:\\[lc]?dots|\.\.\.)\s*(?:\\\})?",
            "least integer",
            "",
        ),
        (rf"{_ALL}\s*{_L}", "any", ""),
        (rf"{_ALL}\s*(?:reals?|real\s+numbers?)\s*{_L}", "real", ""),
        (rf"(?:{_ALL}\s+)?integers?\s*{_L}", "integer", ""),
        (rf"(?:{_ALL}\s+)?positive\s+integers?\s*{_L}", "least integer", "1"),
        (rf"(?:{_ALL}\s+)?{_WHOLE}\s*{_L}", "least integer", "0"),
        (rf"(?:{_ALL}\s+)?natural\s+numbers?\s*{_L}", "natural", ""),
        (rf"{_L}\s+{_IS}integer", "integer", ""),
        (rf"{_L}\s+{_IS}positive\s+integer", "least integer", "1"),
        (rf"{_L}\s+{_IS}{_WHOLE}", "least integer", "0"),
        (rf"{_L}\s+{_IS}natural(?:\s+number)?", "natural", ""),
        (rf"{_L}\s+{_IS}real(?:\s+number)?", "real", ""),
    )
)
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|neq?|in|notin)(?![a-z])|\\begin")


def without_conditions(answer: str, truth: str) -> tuple[str, str] | None:
    """Both formulas without what is said of their letters; None where that differs."""
    (formula, said), (expected, meant) = _split(answer), _split(truth)
    if said is None and meant is None:
        return answer, truth
    if said is not None and meant is not None:
        if said.letter != meant.letter:
            renamed = _renamed(formula, said, meant)
            return (renamed, expected) if renamed and _same(said, meant) else None
        return (formula, expected) if _same(said, meant) else None
    if meant is not None and meant.kind in {"least", "above"} and not meant.is_whole:
        return answer, truth  # half a curve is not the whole
    return formula, expected


def _split(text: str) -> tuple[str, Condition | None]:
    for start in _START.finditer(text):
        formula, tail = text[: start.start()], text[start.start() :]
        condition = _condition(tail)
        if condition is not None and _is_formula_in(formula, condition.letter):
            return _TRAILING.sub("", formula), condition
    return text, None


def _condition(tail: str) -> Condition | None:
    plain = _NOISE.sub(" ", GROUP.sub(r" \1 ", tail)).strip(" ,;.")
    if plain.startswith("(") and plain.endswith(")"):
        plain = plain[1:-1]
    lead = _LEAD.match(plain)
    plain = " ".join(plain[lead.end() if lead else 0 :].split())
    for pattern, kind, bound in _FORMS:
        match = pattern.fullmatch(plain)
        if match is not None:
            said = match.groupdict().get("bound") or bound
            return Condition(match["letter"], kind, said.replace(" ", ""))
    return None


def _is_formula_in(formula: str, letter: str) -> bool:
    if _RELATION.search(formula) or formula.count("(") != formula.count(")"):
        return False
    value = re.sub(r"\\[a-zA-Z]+", " ", GROUP.sub(" ", formula.rpartition("=")[2]))
    return letter in value


def _same(said: Condition, meant: Condition) -> bool:
    if "any" in (said.kind, meant.kind):
        return True
    return bool(_meanings(said) & _meanings(meant))


def _meanings(condition: Condition) -> set[tuple[str, str]]:
    """What a condition may mean: natural numbers begin at 0 or 1, n >= 0 may be whole."""
    kind, bound = condition.kind, condition.bound
    if kind == "natural":
        return {("least integer", "0"), ("least integer", "1")}
    if kind in {"least", "above"} and condition.is_whole:
        return {("least integer", str(int(bound) + (kind == "above")))}
    return {(kind, bound)}


def _renamed(formula: str, said: Condition, meant: Condition) -> str | None:
    """The formula in the other's letter, where both are whole and the letter is not taken."""
    commands = re.split(r"(\\[a-zA-Z]+)", formula)
    free = commands[::2]
    taken = any(meant.letter in piece for piece in free)
    if taken or not (said.is_whole and meant.is_whole):
        return None
    commands[::2] = [piece.replace(said.letter, meant.letter) for piece in free]
    return "".join(commands)
