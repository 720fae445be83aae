r"""Where the final answer stands in a completion: string work in linear time, no parser.

Invariant: cost is linear in the text and independent of what it nests; at most MAX_ANSWER_CHARS
are ever handed on. The *last* \boxed{} counts; several joined by commas, "and" or "or" are one
answer with several elements, so naming two values is not naming one. Without a box, the last
"answer is ..." line. Where a thought is closed, what follows it is the answer: a box in the thought
counts only if nothing follows. In an unfinished thought a box is all that counts.
"""

from __future__ import annotations

import re

MAX_ANSWER_CHARS = 2_000
MAX_BOXES = 64  # tried from the end, so that a text of a million open boxes costs no more
TAIL_CHARS = 4_000  # an answer line further from the end is not final

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_JOINT = re.compile(
    r"(?:[\s$,;&()/*]|\\\\|\\[()\[\],;:! ]|\\q?quad(?![a-z])|\\l(?:or|and)(?![a-z])|\b(?:and|or)\b"
    r"|\\(?:text|mathrm|textrm)\s*\{[\s,;]*(?:and|or)?[\s,;]*\})*"
)
_ANCHOR = re.compile(
    r"####|<answer>|final\s+answer[ \t*]*(?=\n)"
    r"|(?:final\s+answer|answer|result)(?:[ \t]*(?:\*+[ \t]*)?(?:is|:|=)|[ \t]+would[ \t]+be"
    r"|[ \t]*to[^.:\n]{0,80}?(?:is|:))[ \t]*:?\**",
    re.IGNORECASE,
)
_PRAISED = r"(?:[ \t]+(?:correct|right|best|final))?[ \t*]*$"
_DENIED = re.compile(
    r"(?:\b(?:not|wrong|incorrect|false|bad|eliminate)(?:[ \t]+(?:the|my|our|an?))?|\bno)"
    + _PRAISED, re.I,
)
_DOUBTED = re.compile(
    r"(?:\b(?:if|whether|suppos(?:e|ing)|assum(?:e|ing)|unlikely|doubt)"
    r"|(?:n['\u2019]t|\bnot)[ \t]+(?:think|believe|sure))(?:[ \t]+that)?"
    r"(?:[ \t]+(?:the|my|our))?" + _PRAISED, re.I,
)
_ADVERB = re.compile(r"^(?:therefore|thus|hence|then|simply|just|indeed|equal to)\b[ \t,:]*", re.I)
_REASON = re.compile(r"(?:,[ \t]*(?:which|because|since)|[ \t](?:because|since))[ \t].*")
_WEAKENED = re.compile(
    r"\b(?:not|wrong|incorrect|false|or|but|maybe|perhaps|unless|if|except)\b|n't", re.I
)
_NAMED = re.compile(  # Final answer: The number of ways is $42$.
    r"[A-Za-z][A-Za-z ,'-]{0,200} (?:is|are|equals) "
    r"(?P<value>\$[^$]{1,200}\$|[-+]?[\d.,/]{1,40})\.?"
)
_SENTENCE_END = re.compile(  # not in E. coli or St. Petersburg
    r"(?<!\bSt)(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bMt)(?<!\bMrs)"
    r"(?:(?<!\b[A-Z])\.(?:\s|$)|\.(?:\s+(?![a-z\s])|$))"
)
_MATH = re.compile(
    r"\$\$?([^$]{1,2000}?)\$\$?|\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]", re.DOTALL
)
_BARE_LINE = re.compile(r"(?:\$[^$]{1,200}\$|\\\([^\n]{1,200}\\\)|[-+]?[\d.,/%]{1,40})\.?")


def final_answer(text: str) -> str | None:
    """The answer as written, or None when the text gives none."""
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if closed < 0 or opened > closed:  # without a thought, or in an unfinished one
        return last_boxed(text) or _answer_line(end_of_answer(text))
    stated = text[closed + len("</think>") :]
    if not stated.strip():
        return last_boxed(text[:closed])
    return last_boxed(stated) or _answer_line(end_of_answer(text))


def end_of_answer(text: str) -> str:
    """The last TAIL_CHARS of what follows the thought; empty in an unfinished thought."""
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if opened > closed:
        return ""
    start = closed + len("</think>") if closed >= 0 else 0
    return text[max(start, len(text) - TAIL_CHARS) :]


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{}, joined with those that lead up to it."""
    end, found, start_after = len(text), [], None
    for _ in range(MAX_BOXES):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            break
        content, close = _box_content(text, start)
        end = start
        if content is None:
            continue
        if start_after is not None:
            gap = text[close:start_after][:80]
            if close > start_after or not _JOINT.fullmatch(gap):
                break
            if content == found[-1] and not gap.strip(" \n$"):
                start_after = start  # said twice, not two values
                continue
        found.append(content)
        start_after = start
        if "\\boxed" not in text[max(0, start - MAX_ANSWER_CHARS) : start]:
            break
    return ", ".join(reversed(found)) if found else None


def _box_content(text: str, start: int) -> tuple[str | None, int]:
    """What the box at `start` holds and where it ends; None where it is empty, open or too long."""
    opening = _BOX.match(text, start)
    if opening is None or opening.end() >= len(text):
        return None, start
    if text[opening.end()] != "{":  # TeX: a single token
        token = re.compile(r"[^\s$\\{}]{1,40}").match(text, opening.end())
        return (token.group(), token.end()) if token else (None, start)
    depth = 0
    for position in range(opening.end(), min(len(text), opening.end() + MAX_ANSWER_CHARS)):
        character = text[position]
        if character == "{" and text[position - 1] != "\\":
            depth += 1
        elif character == "}" and text[position - 1] != "\\":
            depth -= 1
            if depth == 0:
                content = text[opening.end() + 1 : position].strip()
                return content or None, position + 1
    return None, start


def _answer_line(tail: str) -> str | None:
    for anchor in reversed(list(_ANCHOR.finditer(tail))):
        if is_denied(tail, anchor.start()):
            continue
        rest = tail[anchor.end() :].split("</answer>", 1)[0].lstrip(" \t*")
        if anchor.group() == "<answer>":
            rest = rest.lstrip()
        rest = _ADVERB.sub("", rest, count=1)
        below = _MATH.match(rest.lstrip()) if rest.startswith(("\n", "$$\n", "\\[\n")) else None
        if below is not None:
            return _inside(below)
        line = rest.split("\n", 1)[0].strip()
        values = _joined_math(line)
        answer = _tidy(values or _stated(_SENTENCE_END.split(line, maxsplit=1)[0]))
        if answer:
            return answer
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    if lines and _BARE_LINE.fullmatch(lines[-1].strip("* ")):
        return _tidy(lines[-1])
    return None


def is_denied(text: str, position: int) -> bool:
    """Does what stands before `position` take back that the answer, named there, is one?"""
    before = text[max(0, position - 40) : position]
    return bool(_DENIED.search(before) or _DOUBTED.search(before))


def _stated(sentence: str) -> str:
    """The value of `42, which is even` and `the number of ways is $42$`."""
    reason = _REASON.search(sentence)
    if reason is not None and not _WEAKENED.search(reason.group()):
        sentence = sentence[: reason.start()]
    named = _NAMED.fullmatch(sentence)
    if named is not None and not _WEAKENED.search(sentence):
        return named["value"]
    return sentence


def _joined_math(line: str) -> str | None:
    """What stands in $...$ at the start of a line, together with the $...$ that it is joined to;
    `$3$ and $4$` is one answer with two elements."""
    values, end = [], 0
    for match in _MATH.finditer(line):
        gap = line[end : match.start()]
        hedged = values and re.match(r"\s*,?\s*(?:and|or)\b", gap)
        if not (_JOINT.fullmatch(gap) if values else not gap) and not hedged:
            break
        values.append(_inside(match))
        end = match.end()
    return ", ".join(value for value in values if value) if len(values) > 1 else None


def _inside(match: re.Match[str]) -> str | None:
    return next(group for group in match.groups() if group is not None).strip(" .\n") or None


def _tidy(answer: str) -> str | None:
    answer = answer.strip().strip("*").strip()
    dollars = re.match(r"\$+([^$]+)\$+", answer)
    if dollars:
        answer = dollars.group(1)
    answer = re.sub(r"^\\[(\[](.*?)\\[)\]].*$", r"\1", answer)
    return answer.rstrip(". ").strip() or None
