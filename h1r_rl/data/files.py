"""Parquet and JSONL files as tables: their columns at a glance, their rows memory-mapped.

Invariant: a file that is not there, of another kind, torn or empty is one DataError that names it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from h1r_rl.errors import DataError

FORMATS = {".parquet": "parquet", ".jsonl": "json"}
FIRST_ROWS = 100  # of JSON lines, which may leave out what is null


def columns_of(path: Path, split: str) -> list[str]:
    """Names of a file's columns, its rows unread; of JSON lines those that the first ones have."""
    _check_kinds([path], split)
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(path).names
        with path.open(encoding="utf-8") as lines:
            filled = (line for line in lines if line.strip())
            rows = [json.loads(line) for line in islice(filled, FIRST_ROWS)]
    except Exception as error:  # Arrow's, JSON's and the file system's own types
        raise _unreadable([path], split, error) from None
    if not rows:
        raise DataError(f"data.{split}: expected rows, found none in {path}; add problems")
    if not all(isinstance(row, dict) for row in rows):
        kind = next(type(row).__name__ for row in rows if not isinstance(row, dict))
        raise DataError(
            f"data.{split}: expected a JSON object a line in {path}, found a line with a {kind}; "
            'write each problem as {"column": value, ...}'
        )
    return list(dict.fromkeys(column for row in rows for column in row))


def read_files(paths: Sequence[Path], split: str, cache: Path) -> Any:
    """All files of a split as one memory-mapped dataset."""
    import datasets

    datasets.disable_progress_bars()
    for path in map(Path, paths):
        if not path.is_file():
            beside = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
            close = difflib.get_close_matches(path.name, beside, n=1)
            hint = f"did you mean {close[0]}?" if close else f"{path.parent} has {beside[:10]}"
            raise DataError(f"data.{split}: {path} does not exist; {hint}")
    kind = _check_kinds(paths, split)
    try:
        filled = [str(Path(path).resolve()) for path in paths if not _is_empty(Path(path))]
        if filled:
            cache.mkdir(parents=True, exist_ok=True)
            return datasets.load_dataset(
                FORMATS[kind], data_files=filled, split="train", cache_dir=str(cache)
            )
    except Exception as error:  # the readers raise their own, Arrow's and pandas' error types
        raise _unreadable(paths, split, error) from error
    raise DataError(f"data.{split}: expected rows, found none in {names_of(paths)}; add problems")


def names_of(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _check_kinds(paths: Sequence[Path], split: str) -> str:
    """The one kind of all files, as FORMATS names it."""
    kinds = {Path(path).suffix for path in paths}
    if not kinds <= set(FORMATS) or len(kinds) != 1:
        raise DataError(
            f"data.{split}: expected .parquet files or .jsonl files, found {sorted(kinds)} "
            f"({names_of(paths)}); convert them to one of the two"
        )
    return kinds.pop()


def _is_empty(path: Path) -> bool:
    """The readers trip over files without rows."""
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows == 0
    return path.stat().st_size == 0


def _unreadable(paths: Sequence[Path], split: str, error: BaseException) -> DataError:
    while error.__cause__ is not None:
        error = error.__cause__
    cause = f"{type(error).__name__}: {error}".splitlines()[0]
    return DataError(
        f"data.{split}: {names_of(paths)} cannot be read: {cause}; check that each file is whole "
        "and of the kind that its name says"
    )
