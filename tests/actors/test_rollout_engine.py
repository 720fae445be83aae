"""A real engine: its logprobs, its endings, weights into its running generations."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from h1r_rl.errors import DataError, WeightTransferError
from h1r_rl.interfaces import Sampling


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
async def test_logprobs_are_those_of_the_distribution_sampled_from(
    wire, rollout_pool, tiny_model_folder, temperature
):
    asked, references = wire.prompt(1), []
    for completion in await wire.sample(rollout_pool, asked, 16, Sampling(temperature, 48)):
        expected = wire.reference(tiny_model_folder, asked, completion, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        references.append(expected)  # an answer may be one token long, all of them are not
    assert np.concatenate(references).std() > 0.5  # far from uniform: a wrong model would fail


async def test_endings_carry_their_end_token(wire, rollout_pool, tiny_model_folder):
    from transformers import AutoTokenizer

    from actors.completions import stop_ids

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    ends = stop_ids(str(tiny_model_folder), tokenizer)
    groups = await asyncio.gather(
        *(wire.sample(rollout_pool, wire.prompt(i), 16, Sampling(1.5, 64)) for i in range(10, 18))
    )
    completions = [c for group in groups for c in group]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert stopped and len(stopped) < len(completions)
    for c in completions:
        assert c.finish_reason in ("stop", "length")
        assert (c.token_ids[-1] in ends) == (c.finish_reason == "stop")
        assert not set(c.token_ids[:-1]) & set(ends)
        assert c.text == tokenizer.decode(c.token_ids, skip_special_tokens=True)
        assert len(c.token_ids) == 64 or c.finish_reason == "stop"


async def test_siblings_that_are_done_stream_back_before_the_longest(wire, rollout_pool):
    asked = wire.prompt(10)
    parts = [p async for p in rollout_pool.generate(asked, range(48), Sampling(1.5, 64))]
    assert len(parts) > 1
    assert sorted(i for part in parts for i in part.sample_indices) == list(range(48))
    assert max(parts[0].lengths) < max(parts[-1].lengths) == 64
    assert parts[0].seconds < parts[-1].seconds


async def test_greedy_takes_the_most_likely_token(wire, rollout_pool):
    first, second = [
        (await wire.sample(rollout_pool, wire.prompt(3), 1, Sampling(0.0, 32)))[0] for _ in range(2)
    ]
    np.testing.assert_array_equal(first.token_ids, second.token_ids)


async def test_a_prompt_without_room_is_its_own_fault(wire, rollout_pool):
    with pytest.raises(DataError, match="p0004/0 of 100 tokens leaves 28"):
        await wire.sample(rollout_pool, wire.prompt(4, length=100), 2, Sampling(1.0, 64))
    assert len(rollout_pool.members()) == 1


async def test_a_consumer_that_leaves_stops_its_requests(wire, rollout_pool):
    stream = rollout_pool.generate(wire.prompt(5), range(32), Sampling(1.0, 64))
    task = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await stream.aclose()  # a first part may have come before the cancellation
    end = time.monotonic() + 10
    await wire.sample(
        rollout_pool, wire.prompt(6), 1, Sampling(1.0, 4)
    )  # a step that refreshes the numbers
    while (await rollout_pool.stats())["running"] and time.monotonic() < end:
        await wire.sample(rollout_pool, wire.prompt(6), 1, Sampling(1.0, 4))
    assert rollout_pool._engines.members["rollout-0"].in_flight == 0


@pytest.fixture
async def pool_of_old(wire, rollout_pool, tiny_model_folder):
    """The pool, and however the test ends, the weights that the other tests expect in it."""
    yield rollout_pool
    await wire.push(rollout_pool, wire.Sender(tiny_model_folder), "3")


async def test_weights_reach_running_generations(
    wire, pool_of_old, tiny_model_folder, shake_model, tmp_path
):
    rollout_pool = pool_of_old
    shake_model(tiny_model_folder, tmp_path / "next", seed=7)
    sender = wire.Sender(tmp_path / "next")
    committed = asyncio.Event()

    async def ask_on(seed):  # a fast engine is through with any fixed amount before the commit
        found = []
        while not committed.is_set():
            found += await wire.sample(rollout_pool, wire.prompt(seed), 8, Sampling(1.0, 64))
        return found

    running = [asyncio.create_task(ask_on(i)) for i in range(20, 32)]
    try:
        await wire.sample(rollout_pool, wire.prompt(32), 1, Sampling(1.0, 4))  # all are at work
        pause_s = await wire.push(rollout_pool, sender, "1")
    finally:
        committed.set()
    assert 0 < pause_s < 5
    spans = [c.version_spans for found in await asyncio.gather(*running) for c in found]
    both = [s for s in spans if [v.version for v in s] == ["0", "1"]]
    assert both, f"no generation lived through the update: {spans[:3]}"

    asked = wire.prompt(40)
    for temperature in (0.6, 1.0, 1.3):
        (after,) = await wire.sample(rollout_pool, asked, 1, Sampling(temperature, 48))
        assert [s.version for s in after.version_spans] == ["1"]
        expected = wire.reference(tmp_path / "next", asked, after, temperature)
        np.testing.assert_allclose(after.logprobs, expected, atol=1e-4)
        old = wire.reference(tiny_model_folder, asked, after, temperature)
        assert np.abs(after.logprobs - old).max() > 0.1  # the two models do differ

    before = (await wire.sample(rollout_pool, wire.prompt(41), 1, Sampling(0.0, 48)))[0]
    await wire.push(rollout_pool, sender, "2")
    again = (await wire.sample(rollout_pool, wire.prompt(41), 1, Sampling(0.0, 48)))[0]
    np.testing.assert_array_equal(before.token_ids, again.token_ids)
    np.testing.assert_array_equal(before.logprobs, again.logprobs)


@pytest.mark.parametrize("closes", [True, False], ids=["dies", "hangs"])
async def test_a_lost_sender_costs_a_deadline_and_nothing_else(
    wire, rollout_pool, tiny_model_folder, closes
):
    sender = wire.Sender(tiny_model_folder)
    epoch = sender.open_epoch(rollout_pool.members(), 3.0)
    await asyncio.gather(sender.join(epoch), rollout_pool.join_epoch(epoch))
    await rollout_pool.begin_receive(sender.manifest)
    started = time.monotonic()
    await sender.send(stop_after=1, close=closes)
    asked = wire.prompt(50)
    (during,) = await wire.sample(rollout_pool, asked, 1, Sampling(1.0, 48))
    assert time.monotonic() - started < 3.0  # generation went on meanwhile
    with pytest.raises(WeightTransferError, match="rollout-0.*lost the learner") as caught:
        await rollout_pool.commit("9")
    assert caught.value.members == ("rollout-0",)
    assert time.monotonic() - started < 6.0
    (after,) = await wire.sample(rollout_pool, asked, 1, Sampling(1.0, 48))
    assert [s.version for s in after.version_spans] == [s.version for s in during.version_spans]
    expected = wire.reference(tiny_model_folder, asked, after, 1.0)
    np.testing.assert_allclose(after.logprobs, expected, atol=1e-4)
    await wire.push(rollout_pool, sender, "10")


async def test_a_wrong_checksum_names_its_parameter(wire, rollout_pool, tiny_model_folder):
    sender = wire.Sender(tiny_model_folder)
    epoch = sender.open_epoch(rollout_pool.members(), 5.0)
    await asyncio.gather(sender.join(epoch), rollout_pool.join_epoch(epoch))
    await rollout_pool.begin_receive(sender.manifest)
    await sender.send(lie_about="model.layers.1.mamba.D")
    with pytest.raises(WeightTransferError, match=r"model\.layers\.1\.mamba\.D"):
        await rollout_pool.commit("11")
    await wire.push(rollout_pool, sender, "12")
