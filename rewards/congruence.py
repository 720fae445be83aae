r"""Residues: x \equiv 3 \pmod 5 is x \equiv 8 \pmod 5, and not x \equiv 3 \pmod 7.

Invariant: text and integers alone; None where either of the two names no modulus.
"""

from __future__ import annotations

import re

_CONGRUENCE = re.compile(
    r"\s*(?:(?P<name>[^=]{1,40}?)\s*\\equiv)?(?P<residues>[-+\d\s,]{1,200})"
    r"(?:\\[,;:! ]|\s|\()*\\?(?:p|b)?mod\s*\{?\s*(?P<modulus>\d{1,60})\s*\}?\)?\s*"
)


def congruences_agree(answer: str, truth: str) -> bool | None:
    """Same modulus and same residues; None where that is not the question."""
    if "mod" not in answer or "mod" not in truth:
        return None
    found, expected = _CONGRUENCE.fullmatch(answer), _CONGRUENCE.fullmatch(truth)
    if found is None or expected is None:
        return None
    names = {match.group("name") for match in (found, expected)} - {None}
    modulus = int(expected.group("modulus"))
    if len(names) > 1 or modulus == 0 or int(found.group("modulus")) != modulus:
        return False
    return _residues(found, modulus) == _residues(expected, modulus)


def _residues(match: re.Match[str], modulus: int) -> frozenset[int] | None:
    try:
        numbers = [int(part.replace(" ", "")) for part in match.group("residues").split(",")]
    except ValueError:
        return None
    return frozenset(number % modulus for number in numbers)
