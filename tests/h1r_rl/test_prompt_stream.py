"""The stream is a function of (problems, seed), endless, resumable; nothing is lost silently."""

import json

import numpy as np
import pytest

from h1r_rl.data.chat import make_prompt
from h1r_rl.data.order import ShuffledRows
from h1r_rl.data.prompt_stream import PromptStream
from h1r_rl.data.sources import Problem
from h1r_rl.errors import DataError
from h1r_rl.hybrid.tiny import build_tokenizer

TOKENIZER = build_tokenizer(max_position=512)


def problems(*texts):
    return [
        Problem(f"rl-{i}", ({"role": "user", "content": text},), "math", str(i))
        for i, text in enumerate(texts)
    ]


TEN = problems(*[f"{i}+{i}" for i in range(10)])


def stream_of(rows=TEN, seed=1, max_prompt_tokens=64):
    return PromptStream(
        rows, TOKENIZER, system_prompt=None, seed=seed, max_prompt_tokens=max_prompt_tokens
    )


def keys(stream, count):
    return [stream.next().key for _ in range(count)]


def test_each_pass_has_every_problem_once_in_another_order():
    stream = stream_of()
    prompts = [stream.next() for _ in range(30)]
    passes = [[p.prompt_id for p in prompts[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(ids) == sorted(passes[0]) for ids in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [p.pass_index for p in prompts] == [0] * 10 + [1] * 10 + [2] * 10
    assert len({p.key for p in prompts}) == 30
    problem = next(p for p in TEN if p.prompt_id == prompts[13].prompt_id)
    expected = make_prompt(TOKENIZER, problem, system_prompt=None)
    assert np.array_equal(prompts[13].token_ids, expected.token_ids)


def test_seed_decides():
    assert keys(stream_of(seed=1), 12) == keys(stream_of(seed=1), 12)
    assert keys(stream_of(seed=1), 12) != keys(stream_of(seed=2), 12)


@pytest.mark.parametrize("done", [0, 3, 10, 17])
def test_restored_stream_goes_on_where_it_was(done):
    stream, other = stream_of(), stream_of()
    keys(stream, done)
    other.restore(json.loads(json.dumps(stream.position())))
    assert keys(other, 15) == keys(stream, 15)


def test_position_of_other_data_or_seed_is_refused():
    position = ShuffledRows(10, seed=1).position()
    with pytest.raises(DataError, match="rows = 11, found 10"):
        ShuffledRows(11, seed=1).restore(position)
    with pytest.raises(DataError, match="seed = 2, found 1"):
        ShuffledRows(10, seed=2).restore(position)


def test_long_prompts_are_left_out_and_counted():
    stream = stream_of(problems(*[f"{i}" for i in range(5)], "1+" * 60 + "1"))
    assert stream.num_too_long == 1
    assert {key.split("/")[0] for key in keys(stream, 20)} == {f"rl-{i}" for i in range(5)}


def test_only_long_prompts_end_with_an_explanation():
    with pytest.raises(DataError, match=r"at most 5 tokens, found none among 10 \(shortest 18\)"):
        stream_of(max_prompt_tokens=5)
