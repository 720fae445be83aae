"""The code task: careful programs pass their own tests and hasty ones usually fail them."""

import contextlib
import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1r_rl.config.schema import DataConfig, GenerateDataConfig
from h1r_rl.data.generate import generate_into, generate_splits
from h1r_rl.data.generate_code import CodeTask, code_trace, draw_tasks, ground_truth
from h1r_rl.errors import ConfigError

MIXED = GenerateDataConfig(
    sft_problems=300, rl_problems=200, evaluation_problems=40, code_fraction=0.25,
    evaluation_code_problems=30,
)  # fmt: skip


def output_of(program: str, given: str) -> str:
    """What the interpreter prints: these programs are made here."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {"input": lambda: given.rstrip("\n")})
    return out.getvalue()


def passes(program: str, truth: str) -> bool:
    tests = json.loads(truth)["tests"]
    return all(output_of(program, test["input"]) == test["output"] for test in tests)


def test_known_example():
    task = CodeTask((3, 2, 5, 4), "+*-*")
    assert task.expression == "n+3*2-5*4" and task.brackets == 2
    assert task.value(1) == ((1 + 3) * 2 - 5) * 4
    assert task.program(careful=True) == "print(((int(input())+3)*2-5)*4)"
    assert task.program(careful=False) == "print(int(input())+3*2-5*4)"
    config = GenerateDataConfig(code_careful_fraction=1.0)
    assert code_trace(CodeTask((3, 2), "+*"), config, random.Random(0)) == (
        "<think>1</think>```\nprint((int(input())+3)*2)\n```"
    )


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("+-*"), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(0, 10**6),
)
def test_a_program_passes_exactly_when_it_is_right(steps, seed):
    task = CodeTask(tuple(k for _, k in steps), "".join(sign for sign, _ in steps))
    truth = ground_truth(task, random.Random(seed))
    assert passes(task.program(careful=True), truth)
    hasty = task.program(careful=False)
    same = all(output_of(hasty, str(n)) == f"{task.value(n)}\n" for n in range(-30, 30))
    assert passes(hasty, truth) == same


def test_haste_is_usually_wrong_and_brackets_are_counted():
    tasks = draw_tasks(GenerateDataConfig(), 2000, seed=3)
    assert len(set(tasks)) == 2000
    hasty = [passes(t.program(careful=False), ground_truth(t, random.Random(0))) for t in tasks]
    assert 0.1 < sum(hasty) / 2000 < 0.35
    for task in tasks:
        assert task.program(careful=True).count("((") <= task.brackets
        assert task.program(careful=True).count("(") == 3 + task.brackets
    assert max(len(code_trace(t, GenerateDataConfig(), random.Random(0))) for t in tasks) <= 60


def test_rows_stand_beside_the_arithmetic():
    tables = generate_splits(MIXED, seed=1)
    rows = {split: table.to_pylist() for split, table in tables.items()}
    counts = {s: sum(r["verifier"] == "code" for r in split) for s, split in rows.items()}
    assert counts == {"sft": 75, "rl": 50, "evaluation": 0, "evaluation_code": 30}
    assert {s: len(r) for s, r in rows.items()} == {
        "sft": 300, "rl": 200, "evaluation": 40, "evaluation_code": 30,
    }  # fmt: skip
    code = [r for split in rows.values() for r in split if r["verifier"] == "code"]
    assert len({r["messages"][0]["content"] for r in code}) == 155
    assert len({r["prompt_id"] for split in rows.values() for r in split}) == 570
    right = [r for r in rows["sft"] if r["verifier"] == "code"]
    lines = [r["response"].split("```")[1].strip() for r in right]
    share = sum(passes(x, r["ground_truth"]) for x, r in zip(lines, right, strict=True)) / 75
    assert 0.3 < share < 0.7  # careful ones, and the lucky ones of the others


def test_traces_repeat_where_problems_run_out_and_no_other_split_does():
    few = MIXED.model_copy(update={"code_steps": 2, "sft_problems": 1200})
    rows = {s: t.to_pylist() for s, t in generate_splits(few, seed=1).items()}
    code = {s: [r for r in split if r["verifier"] == "code"] for s, split in rows.items()}
    seen = {s: {r["messages"][0]["content"] for r in split} for s, split in code.items()}
    assert len(code["sft"]) == 300 and len(seen["sft"]) == 145 - 80
    assert len(seen["rl"]) == 50 and len(seen["evaluation_code"]) == 30
    assert len(set().union(*seen.values())) == 145


def test_without_a_share_nothing_changes(tmp_path):
    plain = MIXED.model_copy(update={"code_fraction": 0.0})
    tables = generate_splits(plain, seed=1)
    assert set(tables) == {"sft", "rl", "evaluation"}
    assert all("code" not in table["verifier"].to_pylist() for table in tables.values())
    assert all(table.num_rows == getattr(plain, f"{s}_problems") for s, table in tables.items())
    assert generate_into(DataConfig(generate=plain), tmp_path, seed=1).evaluation_code == ()


def test_files(tmp_path):
    data = generate_into(DataConfig(generate=MIXED), tmp_path, seed=1)
    assert data.evaluation_code == (tmp_path / "evaluation_code.parquet",)
    assert len(list(tmp_path.iterdir())) == 4


def test_stream_is_pinned():
    """Literal values: a change of platform, Python or numpy must not change the data."""
    assert [t.expression for t in draw_tasks(GenerateDataConfig(), 3, seed=0)] == PINNED


PINNED = ["n+6-2+8", "n+3*4*7", "n*1+5*6"]


def test_too_small_a_task_is_refused():
    with pytest.raises(ConfigError, match="at most 145"):
        draw_tasks(GenerateDataConfig(code_steps=2), 200, seed=0)
