r"""Multiple choice (GPQA form) and short answers, by text alone.

Invariant: string work in linear time. A ground truth of one letter A-J asks for a letter;
anything else is a short answer, compared after normalisation. A JSON array of strings lists
several correct short answers.
"""

from __future__ import annotations

import re
import unicodedata

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt, Verdict
from rewards.answer_text import MAX_ANSWER_CHARS, end_of_answer, final_answer
from rewards.exact_answer import compare_exactly, normalise
from rewards.math_verifier import ground_truths
from rewards.verdicts import CORRECT, wrong

_LETTER_TRUTH = re.compile(r"\(?([A-Ja-j])\)?\.?")
_ONLY_LETTER = re.compile(r"(?:option|choice|answer)?\s*\(?([A-Ja-j])\)?(?:[.):].*)?", re.I | re.S)
_SAID_LETTER = re.compile(
    r"(?i:answer|option|choice)[*]*\s*(?i:is)?\s*[:=]?[*]*\s*(?i:option|choice)?\s*[*$({\[]*"
    r"([A-J])(?![A-Za-z])"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s.%/+-]|\.(?!\d)")


def verify(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    """1 or 0; `no_answer` where the text commits to nothing."""
    letter = _LETTER_TRUTH.fullmatch(prompt.ground_truth.strip())
    if letter is not None:
        chosen = chosen_letter(text)
        if chosen is None:
            return wrong("no_answer")
        return CORRECT if chosen == letter.group(1).upper() else wrong("wrong")
    answer = final_answer(text)
    if answer is None:
        return wrong("no_answer")
    if len(answer) > MAX_ANSWER_CHARS:
        return wrong("answer_too_long")
    matches = any(same_short_answer(answer, t) for t in ground_truths(prompt.ground_truth))
    return CORRECT if matches else wrong("wrong")


def check_ground_truth(ground_truth: str) -> str | None:
    """Why no answer could ever be right, or None."""
    if len(ground_truth) > MAX_ANSWER_CHARS:
        return "too_long"
    forms = ground_truths(ground_truth)
    letters = [form for form in forms if _LETTER_TRUTH.fullmatch(form.strip())]
    return None if letters or all(plain(form) for form in forms) else "empty"


def chosen_letter(text: str) -> str | None:
    """The letter in the last box or the last "answer is X"; None where several are named."""
    answer = final_answer(text)
    if answer is not None:
        only = _ONLY_LETTER.fullmatch(normalise(answer).strip("*() "))
        if only is not None:
            return only.group(1).upper()
    end = end_of_answer(text)
    said = _SAID_LETTER.findall(end) if "\\boxed" not in end else []
    return said[-1] if said else None


def same_short_answer(answer: str, truth: str) -> bool:
    """Equal as numbers or, without case, articles and punctuation, as words."""
    return plain(answer) == plain(truth) or compare_exactly(answer, truth) is True


def plain(text: str) -> str:
    """Lower case, compatibility forms unified, no articles, punctuation or runs of space."""
    text = unicodedata.normalize("NFKC", normalise(text)).casefold()
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub(" ", text)).split())
