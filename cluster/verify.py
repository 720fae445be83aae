"""`h1r verify`: completions in a Parquet file scored by the reward pool.

Invariant: the output holds the input's rows, all of them and in their order, with score (null where
no verdict could be had), reason and seconds; it appears whole or not at all. Memory is bounded by
ROWS_AHEAD rows, whatever the file's size.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.verify_rows import COLUMNS, NO_TOKENS, Row, rows_of, values
from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import ConfigError, DataError
from h1r_rl.records import Completion, Verdict, VersionSpan

if TYPE_CHECKING:
    import pyarrow as pa

    from rewards.ground_truth import GroundTruths
    from rewards.pool import RewardPool

RESULTS = ("score", "reason", "seconds")
CHUNK_ROWS = 32  # judged by one worker in one call
ROWS_AHEAD = 4096
START_TIMEOUT_S = 120.0

NO_LOGPROBS = np.zeros(0, np.float32)
NO_SPANS: tuple[VersionSpan, ...] = ()


def verify_file(source: Path, target: Path, config: RewardConfig, workers: int | None) -> None:
    """Score `source` into `target` on an embedded Ray, one worker a core by default."""
    import pyarrow as pa
    import ray

    _refuse_what_needs_a_run(config)
    table = _open(source)
    if not target.parent.is_dir():
        raise DataError(f"expected a folder for {target}, found none; create {target.parent}")
    if target.is_dir() or (target.exists() and target.samefile(source)):
        raise DataError(f"expected another file than {target} to write to; name a new one")
    cores = os.cpu_count() or 1
    config = config.model_copy(update={"workers": workers or cores, "num_cpus": 1.0})
    verifiers = _verifiers(table)
    replaced = [name for name in RESULTS if name in table.schema_arrow.names]
    if replaced:
        print(f"verify: replaces {', '.join(replaced)} of {source}", file=sys.stderr)
    # The user's own verifiers may lie beside the file's user.
    _put_first_on_path(os.getcwd())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=max(config.workers, cores),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="warning",
    )
    draft = target.with_name(f".{target.name}.partial")
    try:
        asyncio.run(_verify(table, draft, config, verifiers))
        draft.replace(target)
    except BaseExceptionGroup as group:
        raise _cause(group, source, target) from group
    except (pa.ArrowException, OSError) as error:
        raise _cause(error, source, target) from error
    finally:
        draft.unlink(missing_ok=True)
        ray.shutdown()


def _refuse_what_needs_a_run(config: RewardConfig) -> None:
    """A file's completions have a text but no tokens, and their scores are their own."""
    if config.overlong_cache_tokens:
        raise ConfigError(
            "reward.overlong_cache_tokens: expected 0 for verify, as a file does not say how many "
            f"tokens a completion has, found {config.overlong_cache_tokens}; leave it out"
        )
    if config.control != "none":
        raise ConfigError(
            "reward.control: expected none for verify, which scores what the file holds, found "
            f"{config.control}; leave it out"
        )


def _open(source: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not source.is_file():
        raise DataError(f"expected a Parquet file, but {source} does not exist")
    try:
        table = pq.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{source} is no Parquet file that can be read: {reason}") from None
    names = table.schema_arrow.names
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        raise DataError(
            f"{source}: expected columns {', '.join(COLUMNS)}, found {', '.join(names)}; add "
            f"{', '.join(missing)}"
        )
    for column in ("completion", "verifier"):
        kind = table.schema_arrow.field(column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_word(kind)):
            raise DataError(f"{source}: expected text in column '{column}', found {kind}")
    return table


def _cause(error: BaseException, source: Path, target: Path) -> BaseException:
    """What ended the work, out of its groups; files that cannot be read or written are said."""
    import pyarrow as pa

    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, (pa.ArrowException, OSError)):
        return DataError(f"{source} -> {target}: {str(error).splitlines()[0]}; nothing is written")
    return error


def _is_word(kind: pa.DataType) -> bool:
    """Text by another storage: dictionary-encoded, a view, or all null."""
    import pyarrow as pa

    encoded = pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type)
    return encoded or pa.types.is_null(kind) or pa.types.is_string_view(kind)


def _verifiers(table: Any) -> frozenset[str]:
    """The names in the file, read without its texts."""
    names: set[str] = set()
    for batch in table.iter_batches(ROWS_AHEAD, columns=["verifier"]):
        names |= {name for name in values(batch.column(0)) if isinstance(name, str)}
    return frozenset(names)


def _put_first_on_path(folder: str) -> None:
    sys.path.insert(0, folder)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder + (os.pathsep + path if path else "")


async def _verify(table: Any, draft: Path, config: RewardConfig, verifiers: frozenset[str]) -> None:
    import pyarrow.parquet as pq

    from rewards.ground_truth import GroundTruths
    from rewards.pool import RewardPool

    schema = _result_schema(table.schema_arrow)
    pool = await RewardPool.start(config, 1, START_TIMEOUT_S, verifiers)
    try:
        with (
            GroundTruths(config) as truths,
            _progress(table.metadata.num_rows) as advance,
            pq.ParquetWriter(draft, schema) as out,
        ):
            await score_all(table, pool, truths, out, advance)
    finally:
        await pool.close()


async def score_all(
    table: Any, pool: RewardPool, truths: GroundTruths, out: Any, advance: Any
) -> None:
    """Consumes batches in order, keeps at most ROWS_AHEAD rows with the pool, writes in order."""
    ahead: deque[tuple[Any, list[asyncio.Task[list[Any]]]]] = deque()
    rows_ahead = 0
    can_check: dict[str, bool] = {}

    async def write_first() -> int:
        batch, tasks = ahead.popleft()
        judged = [item for task in tasks for item in await task]
        out.write_batch(_with_results(batch, judged))
        return batch.num_rows

    async with asyncio.TaskGroup() as group:
        for batch in table.iter_batches(ROWS_AHEAD // 4):
            while ahead and rows_ahead + batch.num_rows > ROWS_AHEAD:
                rows_ahead -= await write_first()
            rows = rows_of(batch)
            await asyncio.to_thread(_check_truths, rows, truths, can_check)
            chunks = (rows[n : n + CHUNK_ROWS] for n in range(0, len(rows), CHUNK_ROWS))
            tasks = [group.create_task(_score_chunk(pool, chunk, advance)) for chunk in chunks]
            ahead.append((batch, tasks))
            rows_ahead += batch.num_rows
        while ahead:
            await write_first()


def _check_truths(rows: list[Row], truths: GroundTruths, can_check: dict[str, bool]) -> None:
    """Says of rows that nothing could be right. The code verifier says it with its verdicts."""
    asked = {row.pair for row in rows if row.reason is None and row.prompt.verifier != "code"}
    for name in {name for name, _ in asked} - can_check.keys():
        can_check[name] = truths.can_check(name)
    pairs = [pair for pair in asked if can_check[pair[0]]]
    bad = {pair: why for pair, why in zip(pairs, truths.check(pairs), strict=True) if why}
    for row in rows:
        if row.reason is None and row.pair in bad:
            row.reason = f"bad_ground_truth:{bad[row.pair]}"


async def _score_chunk(
    pool: RewardPool, rows: list[Row], advance: Any
) -> list[tuple[Any, str, float]]:
    """(score, reason, seconds) of each row. One that has its reason already is not sent."""
    results: list[Any] = [(None, row.reason, 0.0) for row in rows]
    whole = [index for index, row in enumerate(rows) if row.reason is None]
    advance(len(rows) - len(whole))
    if whole:
        prompts = [rows[index].prompt for index in whole]
        completions = [_completion(rows[index].completion) for index in whole]
        async for position, verdict, seconds in pool.stream_each(prompts, completions):
            results[whole[position]] = _result(verdict, seconds)
            advance(1)
    return results


def _completion(text: str) -> Completion:
    return Completion(0, NO_TOKENS, NO_LOGPROBS, NO_SPANS, "stop", text, "file")


def _result(verdict: Verdict, seconds: float) -> tuple[float | None, str, float]:
    return verdict.score, verdict.reason, seconds


def _result_schema(schema: pa.Schema) -> pa.Schema:
    """The input's columns and the results; those of an earlier `verify` are replaced."""
    import pyarrow as pa

    kept = [field for field in schema if field.name not in RESULTS]
    added = [("score", pa.float64()), ("reason", pa.string()), ("seconds", pa.float64())]
    return pa.schema([*kept, *(pa.field(name, kind) for name, kind in added)], schema.metadata)


def _with_results(batch: pa.RecordBatch, judged: list[tuple[Any, str, float]]) -> pa.RecordBatch:
    import pyarrow as pa

    schema = _result_schema(batch.schema)
    kept = [batch.column(name) for name in batch.schema.names if name not in RESULTS]
    columns = list(zip(*judged, strict=True)) or [(), (), ()]
    added = [
        pa.array(values, schema.field(name).type)
        for name, values in zip(RESULTS, columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays([*kept, *added], schema=schema)


class _progress:  # noqa: N801 - reads as a statement
    """A bar on standard error; gives the function that moves it on."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("verify"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self._task = self._bars.add_task("verify", total=total)

    def __enter__(self) -> Any:
        self._bars.start()
        return lambda rows: self._bars.advance(self._task, rows)

    def __exit__(self, *_: object) -> None:
        self._bars.stop()
