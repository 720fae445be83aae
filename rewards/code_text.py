"""The program in a completion: its last Python block, found in time linear in the text.

Invariant: no parser of Python is run here, on text that a model wrote to hang or crash one; at
most TAIL_CHARS are looked at and MAX_CODE_CHARS handed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TAIL_CHARS = 1 << 20
MAX_CODE_CHARS = 256 << 10
PYTHON = {"python", "python3", "py", "py3"}

_FENCE = re.compile(r"^[ \t]{0,3}```[ \t]*([^\s`]*)[^\n`]*$", re.MULTILINE)
_CODE_LINE = re.compile(
    r"^(?:import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b|(?:async[ \t]+)?def[ \t]+\w+|@\w"
    r"|class[ \t]+\w+[ \t]*[:(])", re.M,
)
_NO_PROSE = re.compile(r"[ \t]*(?:#.*)?$|\w+[ \t]*(?::[^=]*)?=")


def answer_part(text: str) -> str | None:
    """What follows the thought; None in an unfinished one."""
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if opened > closed:
        return None
    return text[max(closed + len("</think>") if closed >= 0 else 0, len(text) - TAIL_CHARS) :]


def last_block(text: str) -> str | None:
    """Content of the last closed block that says Python, else of the last without a language."""
    named = unnamed = None
    for language, block in _blocks(text):
        named = block if language in PYTHON else named
        unnamed = block if language == "" else unnamed
    return named if named is not None else unnamed


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each closed block."""
    language, start = None, 0
    for fence in _FENCE.finditer(text):
        said = fence.group(1).lower()
        if language is None or said:  # a fence that names a language never closes a block
            language, start = said, fence.end() + 1
            continue
        yield language, text[start : fence.start()]
        language = None


def completed(stub: str, code: str, entry_point: str) -> str:
    """The candidate: `code` after the prompt's imports and helpers, or as the stub's body."""
    name = re.escape(entry_point)
    defines = re.compile(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*=", re.M)
    stub = stub if not stub or stub.endswith("\n") else stub + "\n"
    if defines.search(code) or not stub:
        return f"{stub}\n{code}"
    return stub + code


def prompt_code(question: str, entry_point: str) -> str:
    """Source that a prompt gives to start from: the last block that defines the function, else the
    last block, else the prompt itself (HumanEval), from where its prose ends."""
    defines = re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.M)
    stubs = [block for _, block in _blocks(question) if defines.search(block)]
    block = stubs[-1] if stubs else last_block(question)
    if block is not None:
        return block
    if not defines.search(question):
        return ""
    code = _CODE_LINE.search(question)
    start = code.start() if code else 0
    is_code = all(_NO_PROSE.match(line) for line in question[:start].splitlines())
    return question if is_code else question[start:]
