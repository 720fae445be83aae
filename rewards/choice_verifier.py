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
from rewards.answer_text import MAX_ANSWER_CHARS, final_answer
from rewards.chosen_letter import chosen_letter
from rewards.exact_answer import compare_exactly, normalise
from rewards.math_verifier import ground_truths
from rewards.verdicts import CORRECT, wrong

_LETTER_TRUTH = re.compile(r"\(?([A-Ja-j])\)?\.?")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_ABOUT = re.compile(r"^~(?=[\d.])")  # elsewhere TeX's blank
_KEPT = frozenset("%/-*!#@")  # punctuation by category, operators by use


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


def same_short_answer(answer: str, truth: str) -> bool:
    """Equal as numbers or, without case, articles and punctuation, as words."""
    answer, truth = (_ABOUT.sub(r"\\sim ", text.strip(" *")) for text in (answer, truth))
    said = plain(answer)
    return (said == plain(truth) and said != "") or compare_exactly(answer, truth) is True


def plain(text: str) -> str:
    """Lower case, compatibility forms unified, no articles, punctuation or runs of space; every
    operator stays, since x<5 is not x>5."""
    text = unicodedata.normalize("NFKC", normalise(text)).casefold()
    text = re.sub(r"[{}_]|(?<=[a-z]{2})!+$", "", text.strip())
    kept = (c if _is_kept(c, text[i + 1 : i + 2]) else " " for i, c in enumerate(text))
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).split())


def _is_kept(character: str, following: str) -> bool:
    if character == ".":
        return following.isdigit()
    return character in _KEPT or not unicodedata.category(character).startswith(("P", "C"))
