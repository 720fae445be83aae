"""Rows of a file to be verified: what stands in its columns as a prompt and a completion.

Invariant: a row that cannot be judged has a reason and raises nothing; no value is turned into
another one silently (bytes are text, or the reason is `not_utf8`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from h1r_rl.records import Prompt

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = ("id", "prompt", "completion", "verifier", "ground_truth")
NEEDED = ("completion", "verifier", "ground_truth")
NO_TOKENS = np.zeros(0, np.int32)


class NotText:
    """In place of a value that holds bytes which are no UTF-8."""


@dataclass(slots=True)
class Row:
    """`reason`: why it has no verdict, or None."""

    prompt: Prompt
    completion: str
    reason: str | None

    @property
    def pair(self) -> tuple[str, str]:
        return self.prompt.verifier, self.prompt.ground_truth


def rows_of(batch: pa.RecordBatch) -> list[Row]:
    columns = [values(batch.column(name)) for name in COLUMNS]
    return [_row(dict(zip(COLUMNS, row, strict=True))) for row in zip(*columns, strict=True)]


def values(column: pa.Array) -> list[Any]:
    """Python values; NotText for those that are no UTF-8, which Parquet does not check."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return NotText()


def _row(row: dict[str, Any]) -> Row:
    """As the run's loader would make it; a chat's last turn is the question."""
    missing = next((column for column in NEEDED if row[column] is None), None)
    reason = None if missing is None else f"missing_{missing}"
    try:
        texts = [_text(row[column]) for column in ("verifier", "completion")]
        truth, question, key = _truth(row["ground_truth"]), _question(row["prompt"]), row["id"]
    except UnicodeDecodeError:
        return Row(Prompt("", 0, NO_TOKENS, "", "", ""), "", reason or "not_utf8")
    key = "" if isinstance(key, NotText) else str(key)
    return Row(Prompt(key, 0, NO_TOKENS, question, texts[0], truth), texts[1], reason)


def _text(value: Any) -> str:
    if isinstance(value, NotText):
        raise UnicodeDecodeError("utf-8", b"", 0, 0, "found by Arrow")
    if isinstance(value, bytes):
        return value.decode()
    return "" if value is None else str(value)


def _truth(value: Any) -> str:
    """Text as it is, a number as its digits, lists and structs as JSON."""
    if isinstance(value, (list, dict, bool)):
        return json.dumps(_without_absent(value), default=_text)
    return _text(value)


def _without_absent(value: Any) -> Any:
    """A struct has all its keys in each row: those that a row does not use are None."""
    if isinstance(value, dict):
        return {key: _without_absent(item) for key, item in value.items() if item is not None}
    return [_without_absent(item) for item in value] if isinstance(value, list) else value


def _question(prompt: Any) -> str:
    """A prompt's text, or the last turn's of a chat, whose content may come in parts."""
    if isinstance(prompt, list):
        last = prompt[-1] if prompt else ""
        prompt = last.get("content") if isinstance(last, dict) else last
    if isinstance(prompt, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in prompt]
        return "\n".join(_text(text) for text in texts if text is not None)
    return _text(prompt)
