"""What columns of a file may hold, judged here without a cluster."""

from __future__ import annotations

import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.verify import score_all, verify_file
from cluster.verify_rows import COLUMNS, rows_of
from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import ConfigError
from h1r_rl.records import Completion, Prompt
from rewards.ground_truth import GroundTruths
from rewards.judge import Judge

CONFIG = RewardConfig(timeout_s=20)


class Pool:
    """A reward pool's `stream_each` by a judge in this process."""

    def __init__(self) -> None:
        self.judge = Judge(CONFIG, 1)
        self.sent: list[Prompt] = []

    async def stream_each(self, prompts: list[Prompt], completions: list[Completion]):
        self.sent += prompts
        for position, pair in enumerate(zip(prompts, completions, strict=True)):
            yield position, self.judge.verdict(*pair), 0.1


@pytest.fixture(scope="module")
def pool():
    pool = Pool()
    yield pool
    pool.judge.close()


class Written(list):
    def write_batch(self, batch: pa.RecordBatch) -> None:
        self.extend(batch.select(["score", "reason"]).to_pylist())


async def scored(table: pa.Table, pool: Pool, folder) -> list[tuple]:
    pq.write_table(table, folder / "in.parquet")
    out, advanced = Written(), []
    with GroundTruths(CONFIG) as truths:
        file = pq.ParquetFile(folder / "in.parquet")
        await score_all(file, pool, truths, out, advanced.append)
    assert len(out) == sum(advanced) == table.num_rows
    return [(row["score"], row["reason"]) for row in out]


def table(truths: pa.Array, verifier="math", completion=r"\boxed{5}", prompt=None) -> pa.Table:
    n = len(truths)
    texts = {"completion": completion, "verifier": verifier}
    columns = {"id": pa.array([str(i) for i in range(n)]), "ground_truth": truths}
    columns |= {k: v if isinstance(v, pa.Array) else pa.array([v] * n) for k, v in texts.items()}
    columns["prompt"] = pa.array(["q"] * n) if prompt is None else prompt
    return pa.table(columns)


def not_text(*values: bytes | None) -> pa.Array:
    """Strings that are no UTF-8: Arrow and Parquet let them be."""
    raw = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), raw.buffers())


async def test_ground_truths_that_cannot_be_had_have_no_score(pool, tmp_path):
    broken = ["", " ", r"\frac{1}{", "[", '["1/2"', "x" * 100_000]
    pool.sent.clear()
    found = await scored(table(pa.array([*broken, "5", "6"])), pool, tmp_path)
    for score, reason in found[: len(broken)]:
        assert score is None and reason.startswith("bad_ground_truth:"), found
    assert found[0] == (None, "bad_ground_truth:empty")
    assert found[-2:] == [(1.0, "correct"), (0.0, "wrong")]
    assert [prompt.ground_truth for prompt in pool.sent] == ["5", "6"]
    letters = table(pa.array(["", "B"]), "choice", "The answer is (B).")
    choice = await scored(letters, pool, tmp_path)
    assert choice == [(None, "bad_ground_truth:empty"), (1.0, "correct")]
    none = await scored(table(pa.array(["1"]), "no_such_package:verify"), pool, tmp_path)
    assert none == [(None, "verifier_error:ModuleNotFoundError")]
    none = await scored(table(pa.array(["1"]), "maths"), pool, tmp_path)
    assert none == [(None, "unknown_verifier")]


@pytest.mark.parametrize(
    "truths",
    [
        pa.array([5, 6]),
        pa.array([5.0, 6.0]),
        pa.array([decimal.Decimal("5.00"), decimal.Decimal("6.00")]),
        pa.array([["4", "5"], ["6"]]),
        pa.array([b"5", b"6"]),
        pa.array([b"5", b"6"], pa.large_binary()),
        pa.array(["5", "6"], pa.large_string()),
        pa.array(["5", "6"]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
async def test_types_of_ground_truth(truths, pool, tmp_path):
    assert await scored(table(truths), pool, tmp_path) == [(1.0, "correct"), (0.0, "wrong")]


async def test_structs_leave_out_what_a_row_has_not(pool, tmp_path, namespaces):
    script = {"tests": [{"input": "1\n", "output": "7\n"}]}
    call = {"fn_name": "f", "tests": [{"input": "3\n4", "output": "7"}]}
    check = {"check": "def check(f):\n    assert f(3, 4) == 7\n", "entry_point": "f"}
    code = pa.array([f"```python\ndef f(a=3, b=4): return {v}\nprint({v})\n```" for v in ("7", 6)])
    for position, text in enumerate(code.to_pylist()):
        truths = pa.array([script, call, check, {"tests": []}])
        found = await scored(table(truths, "code", text), pool, tmp_path)
        expected = [(1.0, "correct"), (0.0, "wrong")][position]
        assert found == [expected] * 3 + [(None, "bad_ground_truth:no_tests")]
    binary = table(pa.array([json.dumps(call).encode()]), "code", code[0].as_py())
    assert await scored(binary, pool, tmp_path) == [(1.0, "correct")]


async def test_bytes_that_are_no_text(pool, tmp_path):
    good, bad = rb"\boxed{5}", b"\xff\xfe"
    found = await scored(
        table(pa.array(["5"] * 3), completion=not_text(good, bad, None)), pool, tmp_path
    )
    assert found == [(1.0, "correct"), (None, "not_utf8"), (None, "missing_completion")]
    for truths in (not_text(b"5", bad), pa.array([b"5", bad])):
        found = await scored(table(truths), pool, tmp_path)
        assert found == [(1.0, "correct"), (None, "not_utf8")]
    found = await scored(table(pa.array(["5"] * 2), not_text(b"math", bad)), pool, tmp_path)
    assert found == [(1.0, "correct"), (None, "not_utf8")]


async def test_empty_and_null_columns(pool, tmp_path):
    assert await scored(table(pa.array([], pa.string())), pool, tmp_path) == []
    nothing = pa.nulls(2)
    for column in ("completion", "verifier"):
        found = await scored(table(pa.array(["5"] * 2), **{column: nothing}), pool, tmp_path)
        assert found == [(None, f"missing_{column}")] * 2
    assert await scored(table(nothing), pool, tmp_path) == [(None, "missing_ground_truth")] * 2


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (pa.array(["What?"]), "What?"),
        (pa.array(["What?"]).dictionary_encode(), "What?"),
        (pa.array([b"What?"]), "What?"),
        (pa.nulls(1), ""),
        (pa.array([[]], pa.list_(pa.string())), ""),
        (pa.array([["a", "What?"]]), "What?"),
        (pa.array([[{"role": "system", "content": "x"}, {"role": "user", "content": "What?"}]]),
         "What?"),
        (pa.array([[{"role": "user", "content": [
            {"type": "text", "text": "See:", "image": None},
            {"type": "image", "text": None, "image": "x.png"},
            {"type": "text", "text": "What?", "image": None}]}]]), "See:\nWhat?"),
    ],
    ids=lambda value: str(getattr(value, "type", value))[:30],
)
def test_prompts(prompt, question):
    (batch,) = table(pa.array(["5"]), prompt=prompt).select(list(COLUMNS)).to_batches()
    (row,) = rows_of(batch)
    assert (row.prompt.question, row.reason) == (question, None)
    assert row.prompt.key and np.size(row.prompt.token_ids) == 0


@pytest.mark.parametrize(
    "changes", [{"overlong_cache_tokens": 4096}, {"control": "constant"}, {"control": "shuffled"}]
)
def test_what_needs_a_run_is_refused(changes, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        verify_file(tmp_path / "in", tmp_path / "out", CONFIG.model_copy(update=changes), None)
