r"""A word before a number: `\text{Day }5` is 5, and not `\text{Week }5` or `\text{June }5`.

Invariant: text alone. A label is dropped only where the other side is a bare number or letter; on
an answer it is one of LABELS, on a ground truth any word that does not change what the number is.
"""

from __future__ import annotations

import re

from rewards.latex_text import GROUP

LABELS = frozenset(
    "day week month year hour minute round step stage level option choice case figure problem"
    " question part room row column line number no player team box door card house page chapter"
    " class grade group type position place floor bus route station store machine item bag test"
    " trial person student seat table track lane locker equation exercise statement answer plan"
    " graph diagram point method car ship train coin ball bucket jar urn pile stack term".split()
)
_CHANGING = frozenset(
    "january february march april may june july august september october november december jan feb"
    " mar apr jun jul aug sep sept oct nov dec monday tuesday wednesday thursday friday saturday"
    " sunday minus negative plus not about over under above below half twice base log sqrt root"
    " sin cos tan exp mod".split()
)
_LABELLED = re.compile(
    r"(?:the\s+)?(?P<word>[A-Za-z]{2,20})\.?[\s~]*(?:\\?#)?\(?(?P<value>\d[\d,]{0,20}|[A-J])\)?\.?",
    re.IGNORECASE,
)
_GAP = r"(?:\\[,;:! ]|\\q?quad|[\s~}])*"
_CHOICE = re.compile(
    rf"\\(?:text|mathrm|textbf|mathbf)\s*\{{\s*\((?P<letter>[A-J])\){_GAP}(?P<value>[^\s}}].*)"
)
_SEVERAL = re.compile(r"\b(?:and|or)\b|\([A-J]\)")
_LETTER = re.compile(r"(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?\s*\(?([A-J])\)?\s*\}?")
_BARE = re.compile(r"\d[\d,]{0,20}|[A-J]")


def unlabelled(answer: str, truth: str) -> tuple[str, str]:
    """Both without their labels where these say nothing else; as they stand otherwise."""
    answer, truth = _chosen(answer, truth), _chosen(truth, answer)
    said, meant = _parts(answer), _parts(truth)
    if said is not None and meant is not None:
        return (said[1], meant[1]) if said[0] == meant[0] else (answer, truth)
    if said is not None and said[0] in LABELS and _BARE.fullmatch(truth.strip()):
        return said[1], truth
    if meant is not None and meant[0] not in _CHANGING and _BARE.fullmatch(answer.strip(" .")):
        return answer, meant[1]
    return answer, truth


def _chosen(text: str, other: str) -> str:
    r"""The letter or the value of `\textbf{(C) }12`, whichever the other side is."""
    choice = _CHOICE.fullmatch(text.strip())
    if choice is None or _CHOICE.fullmatch(other.strip()) or _SEVERAL.search(choice["value"]):
        return text
    letter = _LETTER.fullmatch(other.strip())
    if letter is None:
        return choice["value"]
    return other if letter.group(1) == choice["letter"] else f"({choice['letter']})"


def _parts(text: str) -> tuple[str, str] | None:
    match = _LABELLED.fullmatch(GROUP.sub(r"\1", text).strip())
    return (match["word"].lower(), match["value"]) if match else None
