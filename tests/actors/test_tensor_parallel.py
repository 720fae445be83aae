"""One engine over two ranks: its log-probabilities, and weights into both of them."""

from __future__ import annotations

import numpy as np
import pytest

from h1r_rl.interfaces import Sampling


@pytest.mark.slow
async def test_two_ranks_serve_and_take_weights(
    ray_cluster, wire, rollout_config, weights_config, tiny_model_folder, shake_model, tmp_path
):
    from actors.rollout_pool import RolloutPool

    shake_model(tiny_model_folder, tmp_path / "next", seed=7)
    pool = await RolloutPool.start(
        rollout_config.model_copy(update={"tensor_parallel": 2}), weights_config,
        model_folder=str(tiny_model_folder), seed=0, initial_version="0", run_name="tp",
        start_timeout_s=300,
    )  # fmt: skip
    try:
        assert pool.members() == {"rollout-0": 2}
        for version, folder in (("0", tiny_model_folder), ("1", tmp_path / "next")):
            if version == "1":
                await wire.push(pool, wire.Sender(folder), "1", deadline_s=60.0)
            for completion in await wire.sample(pool, wire.prompt(1), 4, Sampling(1.0, 32)):
                assert {span.version for span in completion.version_spans} == {version}
                expected = wire.reference(folder, wire.prompt(1), completion, 1.0)
                np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    finally:
        await pool.close()
