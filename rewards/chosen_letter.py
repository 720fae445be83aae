"""Which letter of a multiple-choice question a text commits to.

Invariant: string work in linear time on the answer's last TAIL_CHARS. A letter counts only where
the text says that it is the answer, and never where a second one is named beside it: "answer is X"
goes before "option X", which goes before a letter alone on the last line.
"""

from __future__ import annotations

import re

from rewards.answer_text import end_of_answer, final_answer, is_denied
from rewards.exact_answer import normalise

_RUNS = re.compile(r"([\s*_$({\[])\1+")  # without runs, the patterns below take linear time
_ONLY_LETTER = re.compile(
    r"(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)?\s*\(?([A-Ja-j])\)?(?P<rest>[.):].*)?",
    re.I | re.S,
)
_IS = r"(?i:is|are|would be|should be|must be|will be|has to be|:|=)"
_LETTER = (
    r"[*_$\s({\[\"'\u201c\u2018]*(?i:\\(?:text|textbf|mathrm|mathbf)\s*\{\(?)?"
    r"([A-J])(?![A-Za-z]|['\u2019][A-Za-z])"
)
_ANSWER = re.compile(
    rf"\b(?i:answer|correct (?:option|choice)|(?:right|best) (?:answer|option|choice))[*]*"
    rf"\s*{_IS}?\s*(?i:therefore|thus|then)?[:=]?[*]*\s*(?i:option|choice)?{_LETTER}"
)
_OPTION = re.compile(rf"\b(?i:option|choice)[*]*\s*{_IS}?\s*{_LETTER}")
_LETTER_IS_RIGHT = re.compile(
    r"(?<![A-Za-z])(?<!except )(?<!but )(?<!not )(?<!nor )\(?([A-J])\)?[*]* "
    r"(?i:(?:is|must be) (?:the )?(?:correct|right|best))\b"
)
_ALONE = re.compile(r"[*_$({\[\s]*(?:\\(?:text|textbf|mathrm)\{\(?)?([A-J])[)}\]*_$.\s]*")
_SECOND_LETTER = re.compile(
    r"[)\]}*_$.\s]*(?:(?:,\s*)?(?:\b(?:and|or)\b|[/&+])\s*[*_$({\[]*(?:[A-HJ]\b|I\b(?!\s+[a-z]))"
    r"|,\s*[*_$({\[]*[A-J][)\]}*_$]*\s*(?:[.,;)]|$|\b(?:and|or)\b))"
)
_ASKED = re.compile(r"[)\]}*_$\"'\s]*\?")
_LINE = re.compile(r"[*_\s]*\(?([A-J])[).][*_]*\s+(?P<rest>\S[^\n]*)")
_OPTION_MARK = re.compile(r"\b[A-J]\)|\b(?:[Nn]o|[Nn]ot|[Ww]rong|[Ii]ncorrect)\b")
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
    answers = [m for m in _ANSWER.finditer(end) if _is_stated(m, end)]
    if answers:
        return _alone(answers[-1], end)
    options = [
        m
        for m in _OPTION.finditer(end)
        if _is_stated(m, end) and not _REJECTED.match(end, m.end())
    ]
    right = list(_LETTER_IS_RIGHT.finditer(end))
    for found in (right, options):
        if found:
            several = len({match.group(1) for match in found}) > 1
            return None if several else _alone(found[-1], end)
    lines = end.strip().splitlines()
    alone = _ALONE.fullmatch(lines[-1].strip()) if lines else None
    whole = _LINE.fullmatch(end.strip())
    if alone is None and whole is not None and not _OPTION_MARK.search(whole["rest"]):
        return _alone(whole, whole.group()[: whole.end(1)])
    return alone.group(1) if alone else None


def _is_stated(match: re.Match[str], text: str) -> bool:
    """Neither doubted before nor asked behind."""
    return not is_denied(text, match.start()) and not _ASKED.match(text, match.end())


def _alone(match: re.Match[str], text: str) -> str | None:
    """The letter matched, unless another one is joined to it."""
    return None if _SECOND_LETTER.match(text, match.end()) else match.group(1)
