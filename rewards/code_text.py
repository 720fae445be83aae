"""The program in a completion: its last Python block, found in time linear in the text.

Blocks are those of Markdown, inside lists too: a fence of three or more backticks or tildes at any
depth, closed by one of the same kind that is as long and stands no more than three columns deeper;
the opening fence's indentation is taken off each line.

Invariant: no parser of Python is run here, on text that a model wrote to hang or crash one; at
most TAIL_CHARS are looked at and MAX_CODE_CHARS handed on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TAIL_CHARS = 1 << 20
MAX_CODE_CHARS = 256 << 10
PYTHON = {"python", "python3", "py", "py3"}

_FENCE = re.compile(
    r"^(?P<margin>[ \t]*(?P<item>(?:[-*+]|[0-9]{1,9}[.)])[ \t]+)?)(?P<marks>`{3,}|~{3,})"
    r"(?P<info>[^\n`]*)$", re.M,
)
_LANGUAGE = re.compile(r"[ \t]*\{?[ \t]*\.?([\w+#-]*)")  # python, {python}, {.python .numbered}
_CODE_LINE = re.compile(
    r"^(?:import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b|(?:async[ \t]+)?def[ \t]+\w+|@\w"
    r"|class[ \t]+\w+[ \t]*[:(])", re.M,
)
_NO_PROSE = re.compile(r"[ \t]*(?:#.*)?$|\w+[ \t]*(?::[^=]*)?=")
_STATEMENT = re.compile(  # an unindented line that goes on with a program, not with prose
    r"[#)\]}@]|\"\"\"|'''|[A-Za-z_][\w.]*[(\[]"
    r"|[A-Za-z_][\w.]*(?:[ \t]*,[ \t]*[A-Za-z_][\w.]*)*[ \t]*[-+*/%|&^@]{0,2}="
    r"|(?:async[ \t]+)?(?:def|class)[ \t]+\w+[ \t]*[:(]"
    r"|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b|assert\b|pass[ \t]*$"
    r"|(?:async[ \t]+)?(?:if|elif|for|while|with|except)\b.*:[ \t]*(?:#.*)?$"
    r"|(?:else|try|finally|except)[ \t]*:"
)
_HEAD = re.compile(r"(?P<margin>[ \t]*)(?:\S.*)?\S[ \t]*:[ \t]*(?:#.*)?")
_QUOTES = re.compile(r"\"\"\"|'''")
_IMPORT = re.compile(
    r"^(?:import[ \t]+\w[^\n(]*|from[ \t]+[\w.]+[ \t]+import[ \t]+(?:\([^()]*\)|[^\n(]+))", re.M
)
MAX_IMPORTS = 64


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


def block_or_body(text: str, entry_point: str) -> str | None:
    """HumanEval: the last block, or a text that goes on where the prompt's code stops.

    A block that defines the function is preferred to such a text, and the text to other blocks:
    those are examples behind it.
    """
    defines, block, body = _binds(entry_point), last_block(text), _body(text)
    if block is not None and defines.search(block):
        return block
    continues = body.lstrip("\n")[:1] in (" ", "\t") or defines.search(body)
    if body.strip() and (block is None or continues):
        return body
    return block


def _body(text: str) -> str:
    """`text` up to its first fence (the prompt may have opened one) or unindented line of prose."""
    kept, quoted = [], False
    for line in text.split("\n"):
        prose = line[:1].strip() and not _STATEMENT.match(line)
        if not quoted and (prose or _FENCE.match(line)):
            break
        kept.append(line + "\n")
        quoted ^= len(_QUOTES.findall(line)) % 2 == 1
    return "".join(kept)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of each closed block."""
    opening, start = None, 0
    for fence in _FENCE.finditer(text):
        if opening is not None:
            if not _same_kind(opening, fence):
                continue  # of the content
            if not fence["info"].strip() and not fence["item"]:
                yield _language(opening), _dedented(opening, text[start : fence.start()])
                opening = None
                continue
            # A fence that names a language never closes a block: it opens another.
        opening, start = fence, fence.end() + 1


def _same_kind(opening: re.Match[str], fence: re.Match[str]) -> bool:
    return (
        fence["marks"][0] == opening["marks"][0]
        and len(fence["marks"]) >= len(opening["marks"])
        and len(fence["margin"]) <= len(opening["margin"]) + 3
    )


def _language(opening: re.Match[str]) -> str:
    said = _LANGUAGE.match(opening["info"])
    named = said.group(1).lower() if said else ""
    return named or opening["info"].strip()  # what is no name is no Python either


def _dedented(opening: re.Match[str], content: str) -> str:
    margin = len(opening["margin"])
    return re.sub(rf"^[ \t]{{1,{margin}}}", "", content, flags=re.M) if margin else content


def completed(stub: str, code: str, entry_point: str) -> str:
    """The candidate: `code` after the prompt's imports and helpers, or as the stub's body."""
    stub = stub if not stub or stub.endswith("\n") else stub + "\n"
    if _binds(entry_point).search(code) or not stub:
        return f"{with_body(stub)}\n{code}"
    return stub + code


def with_body(stub: str) -> str:
    """`stub`, which compiles: where it ends in the head of a function, with `pass` behind it."""
    code = [line for line in stub.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    head = _HEAD.fullmatch(code[-1]) if code else None
    return f"{stub.rstrip()}\n{head['margin']}    pass\n" if head else stub


def prompt_code(question: str, entry_point: str) -> str:
    """Source that a prompt gives to start from: the last block that defines the function, else the
    prompt itself where it does (HumanEval), from where its prose ends, else the last block."""
    defines = _defines(entry_point)
    stubs = [block for _, block in _blocks(question) if defines.search(block)]
    if stubs:
        return stubs[-1]
    if not defines.search(question):
        return last_block(question) or ""
    code = _CODE_LINE.search(question)
    start = code.start() if code else 0
    is_code = all(_NO_PROSE.match(line) for line in question[:start].splitlines())
    return question if is_code else question[start:]


def prompt_imports(question: str) -> tuple[str, ...]:
    """Import statements at the margin of a prompt's blocks or, where it has none, of its text."""
    source = "\n".join(block for _, block in _blocks(question)) or question
    found = dict.fromkeys(match.group().rstrip() for match in _IMPORT.finditer(source))
    return tuple(found)[:MAX_IMPORTS]


def _defines(entry_point: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(entry_point)}\b", re.M)


def _binds(entry_point: str) -> re.Pattern[str]:
    name = re.escape(entry_point)
    return re.compile(rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*=", re.M)
