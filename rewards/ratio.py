r"""Ratios: 2:3:4 is 4:6:8 and no 2:4:3, and 9:00 is no 10:00.

Invariant: what is equal is asked of the caller, term by term; None where the question is another
one. To a parser, a ratio of three is one of two divisions, in which the order of the last is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations

MAX_TERMS = 6

_COLON = re.compile(r"(?:\\[!,;: ]|\s)*(?::|\\colon(?![a-z]))(?:\\[!,;: ]|\s)*")
_OTHER = re.compile(r"[,;|<>\[\]]|\\(?:text|mathrm|\{|to|mid|in|begin|leq?|geq?)(?![a-z])")
_CLOCK = re.compile(r"[012]?\d:[0-5]\d(?::[0-5]\d)?")
_ZERO = re.compile(r"[-+]?[0.]+")


def ratios_agree(answer: str, truth: str, equal: Callable[[str, str], bool]) -> bool | None:
    """Same number of terms in the same proportion; for times of day, the same time."""
    said, meant = (_COLON.sub(":", text.rpartition("=")[2]).strip() for text in (answer, truth))
    if _CLOCK.fullmatch(said) and _CLOCK.fullmatch(meant):
        return said.zfill(len(meant)) == meant.zfill(len(said))
    terms, true_terms = said.split(":"), meant.split(":")
    if max(len(terms), len(true_terms)) < 3 or _OTHER.search(said + meant):
        return None
    if len(terms) != len(true_terms) or len(terms) > MAX_TERMS or not all(terms + true_terms):
        return False
    if [bool(_ZERO.fullmatch(t)) for t in terms] != [bool(_ZERO.fullmatch(t)) for t in true_terms]:
        return False
    return all(
        equal(f"({a})\\cdot({d})", f"({b})\\cdot({c})")
        for (a, c), (b, d) in combinations(zip(terms, true_terms, strict=True), 2)
    )
