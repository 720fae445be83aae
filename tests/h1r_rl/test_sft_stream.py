"""Traces keep whole prompts; trimming is on the right and counted; batches resume exactly."""

import numpy as np
import pytest

from h1r_rl.data.chat import end_token_id, make_prompt
from h1r_rl.data.sft_stream import SFTStream
from h1r_rl.data.sources import Problem
from h1r_rl.errors import DataError
from h1r_rl.hybrid.tiny import build_tokenizer

TOKENIZER = build_tokenizer(max_position=512)
SEVEN = [f"{i}+1" for i in range(7)]


def stream_of(texts=SEVEN, response="<think></think>\\boxed{2}", max_length=99):
    rows = [
        Problem(f"sft-{i}", ({"role": "user", "content": text},), "math", "", response)
        for i, text in enumerate(texts)
    ]
    return SFTStream(
        rows, TOKENIZER, system_prompt=None, seed=0, max_length=max_length, batch_size=3
    )


def prompt_length(text):
    problem = Problem("p", ({"role": "user", "content": text},), "math", "")
    return len(make_prompt(TOKENIZER, problem, system_prompt=None).token_ids)


def test_batches_cover_a_pass_and_run_on():
    stream = stream_of()
    batches = [stream.next() for _ in range(5)]
    traces = [trace for batch in batches for trace in batch]
    assert [len(batch) for batch in batches] == [3] * 5
    assert sorted(p.prompt_id for p, _ in traces[:7]) == [f"sft-{i}" for i in range(7)]
    assert [p.pass_index for p, _ in traces] == [0] * 7 + [1] * 7 + [2]
    _, completion = traces[0]
    assert completion.token_ids[-1] == end_token_id(TOKENIZER)
    assert completion.finish_reason == "stop"
    assert TOKENIZER.decode(completion.token_ids[:-1]) == "<think></think>\\boxed{2}"
    assert len(completion.logprobs) == len(completion.token_ids) and not completion.logprobs.any()
    assert np.array_equal(completion.token_versions(), np.zeros(len(completion.token_ids)))


def test_long_answers_are_trimmed_on_the_right():
    stream = stream_of(response="x" * 50, max_length=prompt_length("0+1") + 5)
    completions = [completion for _, completion in stream.next()]
    assert all(len(c.token_ids) == 5 and c.finish_reason == "length" for c in completions)
    assert all(c.token_ids[-1] != end_token_id(TOKENIZER) for c in completions)
    assert stream.num_trimmed == 3
    exact = stream_of(response="x" * 50, max_length=prompt_length("0+1") + 51)
    assert all(c.finish_reason == "stop" for _, c in exact.next()) and exact.num_trimmed == 0


def test_prompts_that_fill_the_length_are_left_out():
    stream = stream_of([*SEVEN, "9" * 200])
    ids = {prompt.prompt_id for _ in range(6) for prompt, _ in stream.next()}
    assert ids == {f"sft-{i}" for i in range(7)} and stream.num_dropped >= 1
    with pytest.raises(DataError, match=r"shorter than sft.max_length \(4\), found none among 7"):
        stream_of(max_length=4).next()


def test_restored_stream_goes_on():
    stream, other = stream_of(), stream_of()
    stream.next(), stream.next()
    other.restore(stream.position())
    for _ in range(4):
        assert [p.key for p, _ in stream.next()] == [p.key for p, _ in other.next()]
