"""Problems from Parquet or JSONL files, checked row by row before anything is trained on them.

Invariant: a row either is a usable problem or is quarantined with a counted reason; a file or
column that is not there, an empty split or an id used twice ends the run before it starts. Rows
stay in memory-mapped Arrow files under the cache; a split of millions of traces costs no memory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from h1r_rl.config.schema import DataConfig
from h1r_rl.data.files import names_of, read_files
from h1r_rl.errors import DataError

CheckGroundTruths = Callable[[list[tuple[str, str]]], list[str | None]]
"""(verifier, ground truth) pairs -> for each None, or why it cannot be verified against."""

BATCH_ROWS = 1000
SHOWN_CHARS = 100  # of a ground truth that is refused


@dataclass(frozen=True, slots=True)
class Problem:
    """One usable row. `response` is None outside SFT splits."""

    prompt_id: str
    messages: tuple[dict[str, str], ...]
    verifier: str
    ground_truth: str
    response: str | None = None

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


class ProblemRows(Sequence[Problem]):
    """The usable rows of a memory-mapped table, made into problems when they are asked for."""

    def __init__(
        self, table: Any, kept: NDArray[np.int64], data: DataConfig, need_response: bool
    ) -> None:
        self._table = table
        self._kept = kept
        self._data = data
        self._need_response = need_response

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> ProblemRows: ...
    def __getitem__(self, index: int | slice) -> Problem | ProblemRows:
        if isinstance(index, slice):
            return ProblemRows(self._table, self._kept[index], self._data, self._need_response)
        return self._problem(self._table[int(self._kept[index])])

    def __iter__(self) -> Iterator[Problem]:
        for start in range(0, len(self), BATCH_ROWS):
            columns = self._table[self._kept[start : start + BATCH_ROWS]]
            for values in zip(*columns.values(), strict=True):
                yield self._problem(dict(zip(columns, values, strict=True)))

    def _problem(self, row: dict[str, Any]) -> Problem:
        problem, reason = _problem(row, self._data, self._need_response)
        assert problem is not None, f"row was usable at the check and is not now: {reason}"
        return problem


@dataclass(frozen=True, slots=True)
class Problems:
    """A split. `quarantined` counts the rows left out, by reason."""

    split: str
    rows: Sequence[Problem]
    quarantined: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""  # "row 3 (p3): unparsable ground truth '?'"


def load_problems(
    paths: Sequence[Path],
    data: DataConfig,
    *,
    split: str,
    cache: Path,
    need_response: bool = False,
    check_ground_truths: CheckGroundTruths | None = None,
) -> Problems:
    """Read and validate one split; rows left out are in `<cache>/<split>-quarantine.jsonl`."""
    table = read_files(paths, split, cache)
    needed = [data.id_column, data.prompt_column]
    needed += [data.response_column] if need_response else [data.ground_truth_column]
    _check_columns(table.column_names, needed, split, paths)
    optional = [data.ground_truth_column, data.verifier_column]
    used = [c for c in dict.fromkeys([*needed, *optional]) if c in table.column_names]
    table = table.select_columns(used)
    kept, bad = _check_rows(table, data, split, need_response, check_ground_truths)
    counts = Counter(entry["reason"] for entry in bad)
    listing = cache / f"{split}-quarantine.jsonl"
    listing.unlink(missing_ok=True)  # an earlier start's list would lie
    if bad:
        listing.write_text("".join(json.dumps(entry) + "\n" for entry in bad))
    if not len(kept):
        raise DataError(
            f"data.{split}: expected at least one usable row, found none in {names_of(paths)} "
            f"({', '.join(f'{count} {reason}' for reason, count in counts.items())}; "
            f"{_named(bad[0])}); mend the rows, or check the columns that data.*_column name"
        )
    rows = ProblemRows(table, kept, data, need_response)
    return Problems(split, rows, counts, _named(bad[0]) if bad else "")


def check_disjoint(splits: Sequence[Problems]) -> None:
    """No question may stand in two splits: it would be trained on and then measured."""
    seen: dict[bytes, str] = {}  # digests: millions of questions fit in memory
    for split in splits:
        for problem in split.rows:
            digest = hashlib.blake2b(problem.question.strip().encode(), digest_size=12).digest()
            first = seen.setdefault(digest, split.split)
            if first != split.split:
                raise DataError(
                    f"expected disjoint splits, but {problem.question[:200]!r} "
                    f"({problem.prompt_id}) is in {first} and in {split.split}; remove it from one"
                )


def _check_rows(
    table: Any,
    data: DataConfig,
    split: str,
    need_response: bool,
    check_ground_truths: CheckGroundTruths | None,
) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """(rows that are usable, what is wrong with the others)."""
    kept: list[int] = []
    bad: list[dict[str, Any]] = []
    ids: set[str] = set()
    for start in range(0, len(table), BATCH_ROWS):
        columns = table[start : start + BATCH_ROWS]
        rows = [dict(zip(columns, v, strict=True)) for v in zip(*columns.values(), strict=True)]
        checked = [_problem(row, data, need_response) for row in rows]
        good = [problem for problem, _ in checked if problem is not None]
        verdicts = iter(
            check_ground_truths([(p.verifier, p.ground_truth) for p in good])
            if check_ground_truths is not None and good
            else [None] * len(good)
        )
        for index, (problem, reason) in enumerate(checked, start):
            reason = reason if problem is None else next(verdicts)
            if reason:
                entry = {"row": index, "prompt_id": _id(rows[index - start], data)}
                truth = {"ground_truth": problem.ground_truth[:SHOWN_CHARS]} if problem else {}
                bad.append(entry | {"reason": reason} | truth)
            elif problem is not None:
                _check_new(problem.prompt_id, ids, split)
                kept.append(index)
    return np.array(kept, dtype=np.int64), bad


def _named(entry: dict[str, Any]) -> str:
    """A row left out, for a message."""
    truth = f" ground truth {entry['ground_truth']!r}" if "ground_truth" in entry else ""
    return f"the first: row {entry['row']} ({entry['prompt_id']}): {entry['reason']}{truth}"


def _id(row: dict[str, Any], data: DataConfig) -> str:
    return str(row[data.id_column])


def _check_new(prompt_id: str, ids: set[str], split: str) -> None:
    if prompt_id in ids:
        raise DataError(
            f"data.{split}: expected an id per problem, but {prompt_id!r} is used more than once; "
            "make data.id_column unique"
        )
    ids.add(prompt_id)


def _check_columns(
    found: list[str], needed: Sequence[str], split: str, paths: Sequence[Path]
) -> None:
    for column in needed:
        if column not in found:
            close = difflib.get_close_matches(column, found, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise DataError(
                f"data.{split}: expected a column '{column}', found {found} in {names_of(paths)}; "
                f"{hint}rename it or set data.*_column"
            )


def _problem(
    row: dict[str, Any], data: DataConfig, need_response: bool
) -> tuple[Problem | None, str]:
    """A raw row as a problem, or (None, why not)."""
    prompt = row[data.prompt_column]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        return None, "empty_prompt"
    if not all(isinstance(m, dict) and str(m.get("content") or "").strip() for m in messages):
        return None, "empty_prompt"
    if not all(isinstance(m["content"], str) for m in messages):
        return None, "content_not_text"
    if not all(isinstance(m.get("role"), str) for m in messages):
        return None, "turn_without_role"
    if messages[-1]["role"] != "user":
        return None, "last_turn_not_user"
    response = row.get(data.response_column) if need_response else None
    if need_response and not str(response or "").strip():
        return None, "empty_response"
    truth = row.get(data.ground_truth_column)
    if not need_response and (truth is None or not str(truth).strip()):
        return None, "empty_ground_truth"
    if row[data.id_column] is None:
        return None, "no_id"
    problem = Problem(
        prompt_id=_id(row, data),
        messages=tuple({"role": m["role"], "content": m["content"]} for m in messages),
        verifier=str(row.get(data.verifier_column) or data.default_verifier),
        ground_truth=_truth_text(truth),
        response=None if response is None else str(response),
    )
    return problem, ""


def _truth_text(truth: Any) -> str:
    """Lists (several correct forms) and objects (code's tests) as the verifiers read them."""
    if isinstance(truth, list | dict):
        return json.dumps(truth, ensure_ascii=False, default=str)
    return "" if truth is None else str(truth)
