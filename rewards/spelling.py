r"""One LaTeX spelling for what models spell in several ways: Unicode, Python, fonts, prose.

Invariant: the value never changes, and the work is linear in the text (at most MAX_ANSWER_CHARS).
"""

from __future__ import annotations

import re
from typing import Any

from rewards.latex_text import GROUP

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5),
    "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8),
    "⅞": (7, 8),
}
_CHARACTERS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00d7": "\\times ", "\u22c5": "\\cdot ",
        "\u00b7": "\\cdot ", "\u00f7": "/", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ",
        "≈": "\\approx ", "≡": "\\equiv ",
        "±": "\\pm ", "∓": "\\mp ", "∞": "\\infty ", "π": "\\pi ", "θ": "\\theta ", "∪": "\\cup ",
        "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}",
        "⇒": "\\Rightarrow ", "→": "\\to ", "∼": "\\sim ", "∝": "\\propto ", "¬": "\\neg ",
        "…": "\\ldots ", "′": "'", "\u2019": "'", "⟨": "\\langle ", "⟩": "\\rangle ",
        "¢": "\\text{ cents}", "∧": "\\land ", "∨": "\\lor ",
    }
    | {character: f"\\frac{{{a}}}{{{b}}}" for character, (a, b) in _VULGAR.items()}
)
_ANSWER_IS = (
    r"\s*(?:(?:the\s+)?(?:final\s+)?answer\s*(?:is\s*:?|:)|there\s+are|exactly|a\s+total\s+of)\s*"
)
_BASES = "two three four five six seven eight nine ten eleven twelve".split()
_BASE = "|".join(_BASES)
_PLAIN_NUMBER = re.compile(r"[-+\d.,/]*")
_REWRITE: tuple[tuple[re.Pattern[str], Any], ...] = (
    (re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+"), lambda m: f"^{{{m.group().translate(_SUPERSCRIPTS)}}}"),
    (re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+"), lambda m: f"_{{{m.group().translate(_SUBSCRIPTS)}}}"),
    (re.compile(r"(?<!\\)\\ "), " "),
    (re.compile(r"\\text\s*\{\s*:\s*\}|\{:\}"), ":"),
    (re.compile(r"√\s*\("), r"\\sqrt("),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"√"), r"\\sqrt"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:nicefrac|sfrac|[dtc]frac)(?![a-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\^\s*\{\s*\\(?:degree|circ)\s*\}|\^?\s*\\(?:text)?degree(?![a-z])|\u00b0"),
     r"^\\circ"),
    (re.compile(r"\\(?:textcolor|color)\s*\{[a-zA-Z!\d]{1,20}\}"), ""),
    (re.compile(r"\\(?:underline|boldsymbol|bm|mathit|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:displaystyle|textstyle|bf|large|Large|limits)(?![a-zA-Z])"), ""),
    (re.compile(r"\\(?:left|right)(?![a-z])\s*(?=[\[\]()]|\\[{}]|\\[lr](?:angle|brace))"), ""),
    (re.compile(r"\\langle(?![a-z])"), "("),
    (re.compile(r"\\rangle(?![a-z])"), ")"),
    (re.compile(r"\\l?lbrace(?![a-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-z])"), r"\\}"),
    (re.compile(r"\^\s*\{\s*\\prime\s*\}|\^?\s*\\prime(?![a-z])|\^\s*\{'\}"), "'"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^(\d{2,})"), r"^{\1}"),
    (re.compile(r"\(\s*\\(?:text|mathrm)\s*\{\s*mod\s*\}\s*(\d+)\s*\)|\\pmod\s*(\d+)"),
     lambda m: f"\\pmod{{{m[1] or m[2]}}}"),
    (re.compile(r"(\\sqrt\s*\[\d+\])\s*(\d)"), r"\1{\2}"),
    (re.compile(r"(?<![\^_])\{([-+])\}"), r"\1"),
    (re.compile(r"^\s*([-+]?\d+(?:\.\d+)?)[eE]([-+]?)0*(\d+)\s*$"),
     lambda m: f"{m[1]}\\times 10^{{{m[2].replace('+', '')}{m[3]}}}"),
    (re.compile(rf"^\s*\\text\s*\{{{_ANSWER_IS}\}}\s*|^{_ANSWER_IS}", re.IGNORECASE), ""),
    (re.compile(r"^\s*(?:\\text\s*\{)?\s*(?:(?:the\s+set\s+of\s+)?all\s+(?:the\s+)?real"
                r"(?:\s+numbers|s)|all\s+reals)\s*\}?\s*\.?\s*$", re.IGNORECASE), r"\\mathbb{R}"),
    (re.compile(r"\]\s*([^\[\](){},;]{1,60}),([^\[\](){},;]{1,60})(\[|\])"),
     lambda m: f"({m[1]},{m[2]}{')' if m[3] == '[' else ']'}"),
    (re.compile(r"\[\s*([^\[\](){},;]{1,60}),([^\[\](){},;]{1,60})\["), r"[\1,\2)"),
    (re.compile(r"^\s*\\therefore(?![a-z])\s*"), ""),
    (re.compile(r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![A-Za-z])"), r"\\ln "),
    (re.compile(r"\\lg(?![a-z])"), r"\\log_{10}"),
    (re.compile(r"(?:\{\s*\}|(?<![\w})\]]))[_^](?:\{(\d+)\}|(\d))\s*C_(?:\{(\d+)\}|(\d))"),
     lambda m: f"\\binom{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}"),
    (re.compile(rf"_\s*\{{?\s*\\(?:text|mathrm)\s*\{{\s*(?:base\s+)?({_BASE})\s*\}}\s*\}}?"),
     lambda m: f"_{{{_BASES.index(m[1]) + 2}}}"),
    (re.compile(r"^\s*\(([0-9A-Z]+)\)\s*_(?=[{\d])"), r"\1_"),
    (re.compile(r"^\s*([0-9A-Z]+)\s*\\text\s*\{[\s(]*(?:in\s+)?base[ -](\d+)[\s)]*\}\s*$"),
     r"\1_{\2}"),
    (re.compile(r"\\text\s*\{\s*(?:approximately|approx\.?|about|roughly)\s*\}"), r"\\approx "),
)
_BUILDER = re.compile(
    r"\s*\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*"
    r"(?:\\mid(?![a-z])|\\vert(?![a-z])|\\colon(?![a-z])|:|\|)(.+)\\\}\s*"
)
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|neq?)(?![a-z])")
_SEPARATOR = re.compile(r"[\s.,;:()~]*(or|and)?[\s.,;:()~]*", re.IGNORECASE)
_VALUES = re.compile(r"[\s.,;:()]*(or|and)\s+([-+\d./\s]+)[)\s]*", re.IGNORECASE)
_COUNTED = re.compile(r"\s*(\d[\d,.]*)\s+([A-Za-z][A-Za-z ]*)")
_SPACED_WORD = re.compile(
    r"(?:\\[,;: ]\s*)+\\text\s*\{\s*(and|or)\s*\}(?:\s*\\[,;: ])*|"
    r"\\text\s*\{\s*(and|or)\s*\}(?:\s*\\[,;: ])+"
)
_LOOSE_SEPARATOR = re.compile(r"\(\s*(or|and)\b([^()]*)\)|\\(lor|land|vee|wedge)(?![a-z])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-z])\s*")


def respell(text: str) -> str:
    """The same answer in the spelling that the comparisons know."""
    text = text.strip()
    if _PLAIN_NUMBER.fullmatch(text):  # most of what is compared
        return text
    if not text.isascii():
        for pattern, replacement in _REWRITE[:2]:
            text = pattern.sub(replacement, text)
        text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITE[2:]:
        text = pattern.sub(replacement, text)
    builder = _BUILDER.fullmatch(text)
    if builder is not None and _RELATION.search(builder.group(2)):
        text = builder.group(2).strip()
    return text.strip()


def open_words(text: str) -> str:
    r"""`and` and `or` out of their boxes of text, together with the values that hide there:
    `5\text{. Or 6}` is `5\text{ or } 6`."""
    text = _SPACED_WORD.sub(lambda m: f"\\text{{ {m[1] or m[2]} }}", text)
    whole = GROUP.fullmatch(text.strip())
    counted = _COUNTED.fullmatch(whole.group(1)) if whole else None
    if counted is not None:
        return f"{counted[1]}\\text{{ {counted[2]}}}"
    if whole is not None and any(character.isdigit() for character in whole.group(1)):
        text = whole.group(1)
    text = _LOOSE_SEPARATOR.sub(_loose, text)
    return GROUP.sub(_opened, text)


def _loose(match: re.Match[str]) -> str:
    if match.group(3):
        return "\\text{ or }" if match.group(3) in {"lor", "vee"} else "\\text{ and }"
    return f"\\text{{ {match.group(1)} }}{match.group(2)}"


def _opened(match: re.Match[str]) -> str:
    content = match.group(1)
    if _SEPARATOR.fullmatch(content):
        word = _SEPARATOR.fullmatch(content).group(1)  # pyright: ignore[reportOptionalMemberAccess]
        return f"\\text{{ {word.lower()} }}" if word else match.group()
    values = _VALUES.fullmatch(content)
    if values is not None:
        return f"\\text{{ {values.group(1).lower()} }} {values.group(2)}"
    return match.group()


def both_signs(text: str) -> str:
    r"""`\frac{1\pm\sqrt5}{2}` as its two values; text without a single \pm as it stands."""
    if "\\pm" not in text:
        return text
    opened = re.fullmatch(r"\s*(?:\\left)?\\\{(.*?)(?:\\right)?\\\}\s*", text)
    if opened is not None:
        return f"\\{{{both_signs(opened.group(1))}\\}}"
    return ", ".join(_signs(piece) for piece in _top_level(text))


def _signs(piece: str) -> str:
    signs = _PLUS_MINUS.findall(piece)
    if signs.count("pm") != 1:
        return piece
    forms = []
    for chosen in ("+-", "-+"):
        form = _PLUS_MINUS.sub(lambda m, s=chosen: s[m.group(1) == "mp"], piece)
        forms.append(re.sub(r"(^|[=({,])(\s*)\+", r"\1\2", form))
    return ", ".join(forms)


def _top_level(text: str) -> list[str]:
    """The pieces between commas outside every bracket."""
    pieces, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append(text[start:position])
            start = position + 1
    return [*pieces, text[start:]]
