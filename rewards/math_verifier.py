r"""Mathematics: is the final answer equal to the ground truth?

Invariant: strings and plain rationals are settled without a computer algebra system (`quick`);
everything else goes through math-verify in a process that the caller kills at the deadline, never
relying on math-verify's own signal time-outs. A ground truth may list several correct forms as a
JSON array of strings; one of them is enough.
"""

from __future__ import annotations

import json

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt, Verdict
from rewards.algebra import algebra_agrees, expressions
from rewards.answer_text import MAX_ANSWER_CHARS, final_answer
from rewards.condition import without_conditions
from rewards.exact_answer import compare_exactly, is_number, normalise
from rewards.spelling import open_words, respell
from rewards.units import quantity
from rewards.verdicts import CORRECT, wrong


def verify(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    """1 or 0. Runs in a killable process."""
    verdict = quick(prompt, text, options)
    if verdict is not None:
        return verdict
    answer = final_answer(text) or ""
    asked = prompt.question if "=" in answer else ""
    truths = ground_truths(prompt.ground_truth)
    agrees = any(algebra_agrees(answer, truth, asked) for truth in truths)
    return CORRECT if agrees else wrong("wrong")


def quick(prompt: Prompt, text: str, options: RewardConfig) -> Verdict | None:
    """The verdict where no algebra is needed, else None. Safe to run anywhere."""
    answer = final_answer(text)
    if answer is None:
        return wrong("no_answer")
    if len(answer) > MAX_ANSWER_CHARS:
        return wrong("answer_too_long")
    outcomes = [compare_exactly(answer, truth) for truth in ground_truths(prompt.ground_truth)]
    if True in outcomes:
        return CORRECT
    return None if None in outcomes else wrong("wrong")


def ground_truths(ground_truth: str) -> list[str]:
    """The correct forms: a JSON array of strings (and numbers), or the text itself."""
    if ground_truth.lstrip().startswith("[") and '"' in ground_truth:
        try:  # numbers as they are written, so that 0.50 stays 0.50
            forms = json.loads(ground_truth, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError):
            return [ground_truth]
        if forms and all(isinstance(form, str) for form in forms):
            return forms
    return [ground_truth]


def plainly_valid(ground_truth: str) -> bool:
    """True where a ground truth is a plain number or percentage; no other check is needed."""
    return all(is_number(form) for form in ground_truths(ground_truth))


def check_ground_truth(ground_truth: str) -> str | None:
    """Why no answer could ever be right, or None. Runs in a killable process."""
    for form in ground_truths(ground_truth):
        if not normalise(form):
            return "empty"
        if len(form) > MAX_ANSWER_CHARS:
            return "too_long"
        if not is_number(form) and not _is_readable(form):
            return "unparsable"
    return None


def _is_readable(form: str) -> bool:
    if expressions(form) or expressions(quantity(form).value):
        return True
    formula = open_words(respell(form))
    bare = without_conditions(formula, formula)
    return bare is not None and bare[1] != formula and bool(expressions(bare[1]))


def warm() -> None:
    """Import and run once what the first real item would otherwise pay for."""
    algebra_agrees("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}")
