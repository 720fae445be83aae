"""`h1r verify`: every row comes back, in order, with a verdict; mistakes are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]

SUM = {"tests": [{"input": "3 4\n", "output": "7\n"}]}
ADD = {"fn_name": "add", "tests": [{"input": "3\n4", "output": "7"}]}
CHECK = {"check": "def check(candidate):\n    assert candidate(3, 4) == 7\n", "entry_point": "add"}
STUB = 'def add(a, b):\n    """The sum."""\n'
READS = "```python\na, b = map(int, input().split())\nprint(a {} b)\n```"
DEFINES = "```python\ndef add(a, b):\n    return a + b\n```"
MINE = """
from h1r_rl.records import Verdict

def verify(prompt, text, options):
    return Verdict(len(text.split()) / int(prompt.ground_truth), {}, prompt.question)
"""

# (prompt, completion, verifier, ground truth, score, reason)
ROWS = [
    ("q", r"\boxed{\frac{1}{2}}", "math", "0.5", 1.0, "correct"),
    ("q", r"\boxed{9^{9^{9^9}}}", "math", "1", 0.0, "timeout"),
    ("q", r"\boxed{3}", "math", "1", 0.0, "wrong"),
    ("q", "The answer is (B).", "choice", "B", 1.0, "correct"),
    ("q", "no idea", "choice", "B", 0.0, "no_answer"),
    ("q", READS.format("+"), "code", json.dumps(SUM), 1.0, "correct"),
    ("q", READS.format("-"), "code", json.dumps(SUM), 0.0, "wrong"),
    ("q", DEFINES, "code", json.dumps(ADD), 1.0, "correct"),
    (STUB, "    return a + b\n", "code", json.dumps(CHECK), 1.0, "correct"),
    (STUB, "    return a * b\n", "code", json.dumps(CHECK), 0.0, "wrong"),
    ("q", "x", "code", "{}", None, "bad_ground_truth:no_tests"),
    ("mine", "a b c", "my_rewards:verify", "4", 0.75, "mine"),
    ("q", r"\boxed{1}", "math", r"\frac{1}{", None, "bad_ground_truth:unparsable"),
    ("q", "x", "maths", "1", None, "unknown_verifier"),
    ("q", None, "math", "1", None, "missing_completion"),
    ("q", "x", "math", None, None, "missing_ground_truth"),
]


def verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cluster.cli", "verify", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def table(rows: list[tuple]) -> pa.Table:
    names = ("prompt", "completion", "verifier", "ground_truth", "expected", "expected_reason")
    dicts = [dict(zip(names, row, strict=True)) for row in rows]
    return pa.Table.from_pylist([{"id": f"r{i}"} | row for i, row in enumerate(dicts)])


def test_all_rows_come_back_in_order(tmp_path, namespaces):
    (tmp_path / "my_rewards.py").write_text(MINE)
    rows = [*ROWS, *(ROWS[k % 5 if k % 5 != 1 else 0] for k in range(400))]
    made = table(rows)
    earlier = made.append_column("score", pa.array(["old"] * len(rows)))  # is replaced
    verifiers = earlier["verifier"].dictionary_encode()
    earlier = earlier.set_column(earlier.schema.get_field_index("verifier"), "verifier", verifiers)
    pq.write_table(earlier, tmp_path / "in.parquet", row_group_size=100)
    arguments = ["in.parquet", "out.parquet", "reward.timeout_s=2", "--workers", "2"]
    done = verify(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "replaces score of in.parquet" in done.stderr
    assert f"{len(rows)}/{len(rows)}" in done.stderr
    out = pq.read_table(tmp_path / "out.parquet")
    kept = out.drop(["score", "reason", "seconds"])
    assert kept.schema.names == made.schema.names and kept.to_pylist() == made.to_pylist()
    assert out.schema.names[-3:] == ["score", "reason", "seconds"]
    found = out.to_pylist()
    for row in found:
        assert (row["score"], row["reason"]) == (row["expected"], row["expected_reason"]), row["id"]
    assert found[1]["seconds"] >= 2 and found[0]["seconds"] < 2
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.parquet", "out.parquet"], ["none.parquet", "does not exist"]),
        (["text.parquet", "out.parquet"], ["text.parquet", "Parquet"]),
        (["few.parquet", "out.parquet"], ["completion", "found id, prompt"]),
        (["numbers.parquet", "out.parquet"], ["completion", "int64"]),
        (["in.parquet", "in.parquet"], ["another file"]),
        (["in.parquet", "nowhere/out.parquet"], ["nowhere"]),
        (["in.parquet", "out.parquet", "reward.timeout=2"], ["timeout_s"]),
        (["in.parquet", "out.parquet", "grpo.steps=2"], ["reward"]),
        (["in.parquet", "out.parquet", "reward.overlong_cache_tokens=9"], ["overlong", "leave it"]),
        (["in.parquet", "out.parquet", "reward.control=constant"], ["control", "leave it"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    from cluster.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["h1r", "verify", *arguments])
    good = table(ROWS[:1])
    pq.write_table(good, tmp_path / "in.parquet")
    pq.write_table(good.select(["id", "prompt"]), tmp_path / "few.parquet")
    numbers = good.set_column(2, "completion", pa.array([1]))
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    (tmp_path / "text.parquet").write_text("id,prompt\n")
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert len(said.strip().splitlines()) == 1
    for word in words:
        assert word in said
    assert not (tmp_path / "out.parquet").exists()
