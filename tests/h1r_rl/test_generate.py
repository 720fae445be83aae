"""The tiny task is right, disjoint, and the same bytes for the same seed."""

import random

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h1r_rl.config.schema import DataConfig, GenerateDataConfig
from h1r_rl.data.generate import Problem, draw_problems, generate_into, generate_splits, sft_trace
from h1r_rl.errors import ConfigError

SMALL = GenerateDataConfig(sft_problems=300, rl_problems=200, evaluation_problems=100)


def left_to_right(expression, modulus):
    """Independent reference: Python evaluates fully parenthesised text; one modulo at the end."""
    out = ""
    for char in expression:
        out = f"({out}){char}" if char in "+-*" else out + char
    return eval(out) % modulus  # digits and operators made here


def test_known_example():
    problem = Problem((7, 8, 3, 4, 2), "+*-*")
    assert problem.expression == "7+8*3-4*2"
    assert problem.results(10) == [5, 5, 1, 2]
    config = GenerateDataConfig(worked_fraction=1.0)
    assert sft_trace(problem, config, random.Random(0)) == (
        "<think>7+8=5*3=5-4=1*2=2</think>\\boxed{2}"
    )


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=7), st.integers(2, 97), st.integers(0, 10**6)
)
def test_answer_equals_brute_force(operands, modulus, seed):
    rng = random.Random(seed)
    problem = Problem(tuple(operands), "".join(rng.choices("+-*", k=len(operands) - 1)))
    assert problem.answer(modulus) == left_to_right(problem.expression, modulus)


def test_splits_are_disjoint_and_complete():
    tables = generate_splits(SMALL, seed=1)
    texts = {k: {m[0]["content"] for m in t["messages"].to_pylist()} for k, t in tables.items()}
    assert {k: len(v) for k, v in texts.items()} == {"sft": 300, "rl": 200, "evaluation": 100}
    assert len(set().union(*texts.values())) == 600
    ids = [i for t in tables.values() for i in t["prompt_id"].to_pylist()]
    assert len(set(ids)) == 600
    assert tables["rl"]["response"].null_count == 200
    for table in tables.values():
        for row in table.to_pylist():
            expected = left_to_right(row["messages"][0]["content"], 10)
            assert row["ground_truth"] == str(expected)
            if row["response"]:
                assert row["response"].endswith(f"\\boxed{{{expected}}}")


def test_stream_is_pinned():
    """Literal values: a change of platform, Python or numpy must not change the data."""
    problems = draw_problems(GenerateDataConfig(), 3, seed=0)
    assert [p.expression for p in problems] == PINNED


PINNED = ["3*4+5*5", "4*4-6*1-4-3", "5-3-2+6"]


def test_shares_of_traces():
    config = GenerateDataConfig(sft_problems=4000, worked_fraction=0.3, unformatted_fraction=0.2)
    responses = generate_splits(config, seed=0)["sft"]["response"].to_pylist()
    worked = sum(r.count("=") > 1 for r in responses) / 4000
    formatted = sum(r.startswith("<think>") for r in responses) / 4000
    assert worked == pytest.approx(0.3, abs=0.03) and formatted == pytest.approx(0.8, abs=0.03)


def test_style_does_not_move_problems():
    other = SMALL.model_copy(update={"worked_fraction": 0.9})
    a, b = generate_splits(SMALL, seed=1), generate_splits(other, seed=1)
    for split in a:
        assert a[split]["messages"] == b[split]["messages"]
    assert a["sft"]["response"] != b["sft"]["response"]


def test_files_are_deterministic_and_whole(tmp_path):
    data = DataConfig(generate=SMALL)
    first = generate_into(data, tmp_path / "a", seed=5)
    second = generate_into(data, tmp_path / "b", seed=5)
    other = generate_into(data, tmp_path / "c", seed=6)
    assert first.generate is None and first.sft == (tmp_path / "a" / "sft.parquet",)
    for split in ("sft", "rl", "evaluation"):
        (a,), (b,), (c,) = (getattr(x, split) for x in (first, second, other))
        assert a.read_bytes() == b.read_bytes() != c.read_bytes()
        assert pq.read_table(a).num_rows == getattr(SMALL, f"{split}_problems")
    assert len(list((tmp_path / "a").iterdir())) == 3  # no drafts left
    assert generate_into(DataConfig(rl=(tmp_path,)), tmp_path / "d", seed=0).rl == (tmp_path,)
    assert not (tmp_path / "d").exists()


def test_files_that_are_there_are_left(tmp_path):
    data = generate_into(DataConfig(generate=SMALL), tmp_path, seed=5)
    before = data.rl[0].stat().st_mtime_ns
    assert generate_into(DataConfig(generate=SMALL), tmp_path, seed=5) == data
    assert data.rl[0].stat().st_mtime_ns == before


def test_too_small_a_task_is_refused():
    config = GenerateDataConfig(min_operands=2, max_operands=2, sft_problems=200)
    with pytest.raises(ConfigError, match="243 exist"):
        generate_splits(config, seed=0)
