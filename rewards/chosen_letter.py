"""Which letter of a multiple-choice question a text commits to.

Invariant: string work in linear time on the answer's last TAIL_CHARS. A letter counts only where
the text says that it is the answer, and never where a second one is named beside it: "answer is X"
goes before "option X", which goes before a letter alone on the last line.
"""

from __future__ import annotations

import re

from rewards.answer_text import end_of_answer, final_answer
from rewards.exact_answer import normalise

_RUNS = re.compile(r"([\s*_$({\[])\1+")  # without runs, the patterns below take linear time
_ONLY_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)?\s*\(?([A-Ja-j])\)?(?P<rest>[.):].*)?",
    re.I | re.S,
)
_DENIED = r"(?<!incorrect )(?<!wrong )(?<!not )(?<!not an )(?<!not the )(?<!eliminate )(?<!false )"
_IS = r"(?i:is|are|would be|should be|must be|will be|has to be|:|=)"
_LETTER = r"[*_$\s({\[]*(?i:\\(?:text|textbf|mathrm|mathbf)\s*\{\(?)?([A-J])(?![A-Za-z'])"
_ANSWER = re.compile(
    rf"{_DENIED}\b(?i:answer|correct (?:option|choice)|(?:right|best) (?:answer|option|choice))[*]*"
    rf"\s*{_IS}?\s*[:=]?[*]*\s*(?i:option|choice)?{_LETTER}"
)
_OPTION = re.compile(rf"{_DENIED}\b(?i:option|choice)[*]*\s*{_IS}?\s*{_LETTER}")
_LETTER_IS_RIGHT = re.compile(
    r"(?<![A-Za-z])\(?([A-J])\)?[*]* (?i:(?:is|must be) (?:the )?(?:correct|right|best))\b"
)
_ALONE = re.compile(r"[*_$({\[\s]*(?:\\(?:text|textbf|mathrm)\{\(?)?([A-J])[)}\]*_$.\s]*")
_SECOND_LETTER = re.compile(
    r"[)\]}*_$.\s]*(?:(?:,\s*)?(?:\b(?:and|or)\b|[/&+])\s*[*_$({\[]*(?:[A-HJ]\b|I\b(?!\s+[a-z]))"
    r"|,\s*[*_$({\[]*[A-J][)\]}*_$]*\s*(?:[.,;)]|$|\b(?:and|or)\b))"
)
_TAKEN_BACK = re.compile(
    r"\b(?:no|not|wait|actually|rather|instead)\b[\s,:;]*\(?[A-J]\)?[\s.)]*$", re.IGNORECASE
)
_REJECTED = re.compile(
    r"[)\]}*_$\s]*(?:is|was|are|seems|cannot be|can't be|isn't)?\s*(?:clearly |also )?"
    r"(?:wrong|incorrect|not|false|ruled out|eliminated|cannot|can't|isn't)\b", re.IGNORECASE
)


def chosen_letter(text: str) -> str | None:
    """The letter the text commits to, or None where it names none or several."""
    end = _RUNS.sub(r"\1", end_of_answer(text))
    answer = final_answer(text)
    if answer is not None:
        only = _ONLY_LETTER.fullmatch(normalise(answer).strip("*() "))
        if only is not None:
            rest = only.group("rest") or ""
            if _SECOND_LETTER.match(rest.lstrip(".):")) or _TAKEN_BACK.search(rest):
                return None
            return only.group(1).upper()
    if "\\boxed" in end:
        return None
    return _said(end)


def _said(end: str) -> str | None:
    answers = list(_ANSWER.finditer(end))
    if answers:
        return _alone(answers[-1], end)
    options = [m for m in _OPTION.finditer(end) if not _REJECTED.match(end, m.end())]
    right = list(_LETTER_IS_RIGHT.finditer(end))
    for found in (right, options):
        if found:
            several = len({match.group(1) for match in found}) > 1
            return None if several else _alone(found[-1], end)
    lines = end.strip().splitlines()
    alone = _ALONE.fullmatch(lines[-1].strip()) if lines else None
    return alone.group(1) if alone else None


def _alone(match: re.Match[str], text: str) -> str | None:
    """The letter matched, unless another one is joined to it."""
    return None if _SECOND_LETTER.match(text, match.end()) else match.group(1)
