"""Is the completion `<think>reasoning</think> answer`, each part there, in this order, once?

Invariant: counting and finding only, linear in the text; nothing is parsed.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def well_formed(text: str) -> bool:
    """One thought, opened first and closed once, then an answer; neither of them empty."""
    text = text.lstrip()
    if not text.startswith(OPEN) or text.count(OPEN) != 1 or text.count(CLOSE) != 1:
        return False
    thought, _, answer = text[len(OPEN) :].partition(CLOSE)
    return bool(thought.strip()) and bool(answer.strip())
