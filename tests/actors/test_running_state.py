"""Prefix blocks of older weights serve nobody, whichever way running requests live through an
update: a prompt issued after it, or queued over it, gets a cold engine's log-probabilities."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from h1r_rl.interfaces import Sampling


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("running_state", ["keep", "recompute"])
async def test_a_prompt_after_an_update_reads_no_older_prefix(
    ray_cluster, wire, tiny_model_folder, shake_model, rollout_config, weights_config, tmp_path,
    running_state,
):  # fmt: skip
    from actors.rollout_pool import RolloutPool

    shake_model(tiny_model_folder, tmp_path / "next", seed=7)
    sender = wire.Sender(tmp_path / "next")
    config = rollout_config.model_copy(
        update={
            "prefix_caching": True, "running_state": running_state, "max_model_len": 512,
            "request_timeout_s": 300, "max_num_seqs": 32,
        }
    )  # fmt: skip
    pool = await RolloutPool.start(
        config, weights_config.model_copy(update={"deadline_s": 60}),
        model_folder=str(tiny_model_folder), seed=0, initial_version="0", run_name="state",
        start_timeout_s=600,
    )  # fmt: skip
    try:
        (block,) = (await pool.ask_worker("block_tokens")).values()
        asked = wire.prompt(60, length=2 * block + 9)
        for _ in range(2):
            await wire.sample(pool, asked, 2, Sampling(1.0, 4))
        before = await pool.stats()
        assert before["cached_tokens"] > 0  # the cache is alive, or this test would say nothing

        running = [
            asyncio.create_task(wire.sample(pool, wire.prompt(i, length=40), 8, Sampling(1.0, 400)))
            for i in range(61, 77)  # more than there are seats
        ]
        while not (await pool.stats())["running"]:  # noqa: ASYNC110 - another process is asked
            await asyncio.sleep(0.05)
        queued = asyncio.create_task(wire.sample(pool, asked, 4, Sampling(1.0, 32)))
        await asyncio.sleep(0.2)
        await wire.push(pool, sender, "1", deadline_s=60)
        later = asyncio.create_task(wire.sample(pool, asked, 1, Sampling(1.0, 32)))
        for completion in (*await later, *await queued):
            assert [s.version for s in completion.version_spans] == ["1"]
            expected = wire.reference(tmp_path / "next", asked, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
            old = wire.reference(tiny_model_folder, asked, completion, 1.0)
            assert np.abs(completion.logprobs - old).max() > 0.1
        recalled = (await pool.stats())["recalled"]
        assert recalled >= 4 if running_state == "keep" else recalled == 0

        groups = await asyncio.gather(*running)
        lived = [
            (wire.prompt(61 + i, length=40), c)
            for i, group in enumerate(groups)
            for c in group
            if [s.version for s in c.version_spans] == ["0", "1"]
        ]
        assert lived, "no generation lived through the update"
        refilled = (await pool.stats())["reprefilled"] - before["reprefilled"]
        if running_state == "keep":
            assert refilled == 0
        else:  # what follows the update was sampled as the new weights alone would have it
            assert refilled > 0
            asked, completion = lived[0]
            start = completion.version_spans[1].start
            expected = wire.reference(tmp_path / "next", asked, completion, 1.0)
            np.testing.assert_allclose(completion.logprobs[start:], expected[start:], atol=1e-3)
    finally:
        await pool.close()
