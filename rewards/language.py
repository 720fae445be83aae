r"""Does a completion stay in its language? Measured by script: the share of its letters that belong
to none of the scripts expected (DeepSeek-R1's language consistency, arXiv 2501.12948, 2.3.2).

Invariant: linear in the text, and at most MAX_CHARS of it. Mathematics, code, tags and LaTeX
commands are in no language and are not counted, nor is a Greek letter on its own. A script is the
first word of a letter's Unicode name, after compatibility forms are unified: CJK, HIRAGANA, LATIN.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from functools import lru_cache

MAX_CHARS = 2_000_000

_DELIMITER = re.compile(r"(```|`|\$\$|\$|\\[()\[\]])")
_CLOSED_BY = {"```": "```", "`": "`", "$$": "$$", "$": "$", "\\(": "\\)", "\\[": "\\]"}
_WITHIN_A_LINE = frozenset({"$", "`"})  # a lone one is a price or a quote, and hides nothing
_COMMAND = re.compile(r"\\[A-Za-z]+|</?[A-Za-z_]{1,20}>")
_SYMBOL = re.compile(r"(?<![^\W\d_])[\u0370-\u03ff](?![^\W\d_])")


def language_kept(text: str, scripts: Collection[str], tolerance: float) -> float:
    """1.0 where at most `tolerance` of the letters are foreign, else the share that is not."""
    share = foreign_share(text, scripts)
    return 1.0 if share <= tolerance else 1.0 - share


def foreign_share(text: str, scripts: Collection[str]) -> float:
    """Letters outside `scripts` over all letters of the prose; 0 where there are none."""
    prose = unicodedata.normalize("NFKC", _COMMAND.sub(" ", _prose(text[:MAX_CHARS])))
    counts: Counter[str] = Counter()
    for character, number in Counter(_SYMBOL.sub(" ", prose)).items():
        if character.isalpha():
            counts[_script(character)] += number
    letters = counts.total()
    return sum(n for name, n in counts.items() if name not in scripts) / letters if letters else 0.0


def _prose(text: str) -> str:
    """What stands outside formulas and code. A block of code that is never closed is code."""
    kept: list[str] = []
    inside: list[str] = []  # since the opening delimiter; prose after all where none closes it
    opened = ""
    for index, piece in enumerate(_DELIMITER.split(text)):
        if opened in _WITHIN_A_LINE and "\n" in piece:
            kept += inside
            opened, inside = "", []
        if index % 2 == 0:
            (inside if opened else kept).append(piece)
        elif opened and piece == _CLOSED_BY[opened]:
            opened, inside = "", []
        elif not opened and piece in _CLOSED_BY:
            opened = piece
    return " ".join(kept + ([] if opened == "```" else inside))


@lru_cache(maxsize=65_536)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
