"""Every hybrid family through learner, wire and engine: vLLM serves the learner's export, and after
a trained step the weights that it was sent give transformers' logprobs of the next export."""

from __future__ import annotations

import asyncio
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from h1r_rl.config.schema import LearnerConfig, OptimizerConfig
from h1r_rl.grpo.build_batch import plan_sft_batch
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict, VersionSpan

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
# GraniteMoeHybrid with two groups has no common answer: transformers norms all channels together,
# vLLM each group apart; published ones have one.
NAMES = tuple(n for n in FORMATS["MODELS"] if not n.startswith("granite-2"))
SHORT = ("falcon-2-rms-tied", "granite-1-tied", "nemotron-1")
MARKED = [
    pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.proof)
    for name in NAMES
]


def trace(seed: int) -> Group:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 250, 20, dtype=np.int32)
    spans = (VersionSpan("0", 0, len(ids)),)
    answer = Completion(0, ids, np.zeros(len(ids), np.float32), spans, "stop", "", "sft")
    prompt = Prompt(f"p{seed}", 0, rng.integers(5, 250, 7, dtype=np.int32), "", "math", "1")
    sample = Sample(0, len(ids), "stop", spans, Verdict(1.0), ray.put([answer]), 0)
    return Group(prompt, (sample,), 0)


@pytest.mark.parametrize("name", MARKED)
async def test_a_trained_step_reaches_the_engine(
    ray_cluster, rollout_config, weights_config, wire, tmp_path, name
):
    from actors.rollout_pool import RolloutPool
    from learners.learner_group import LearnerGroup

    FORMATS["write_folder"](name, tmp_path / "base")
    learner = await LearnerGroup.start(
        LearnerConfig(num_cpus=0.5), OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
        total_steps=10, model_folder=str(tmp_path / "base"), algorithm=None, temperature=1.0,
        max_response_tokens=64, weights=weights_config, seed=0, start_timeout_s=200,
    )  # fmt: skip
    pool = None
    try:
        await learner.export(str(tmp_path / "first"))
        pool = await RolloutPool.start(
            rollout_config, weights_config, model_folder=str(tmp_path / "first"), seed=0,
            initial_version="0", run_name="formats", start_timeout_s=250,
        )  # fmt: skip
        before = await agreement(wire, pool, tmp_path / "first", "0")

        groups = [trace(seed) for seed in range(4)]
        plan = plan_sft_batch(groups, ranks=1, micro_batch_tokens=60, learner_version=0)
        await learner.forward_backward(plan)
        assert (await learner.optimizer_step()).version == 1
        await learner.export(str(tmp_path / "trained"))
        await push(learner, pool)
        after = await agreement(wire, pool, tmp_path / "trained", "1")
        moved = np.abs(before - after).max()
        assert moved > 0.02  # the step is far above what the two may differ by
    finally:
        await learner.close()
        if pool is not None:
            await pool.close()


async def push(learner, pool) -> None:
    manifest = await learner.weight_manifest()
    members = pool.members()
    offsets = {name: 1 + i for i, name in enumerate(members)}
    epoch = await learner.open_epoch(1 + len(members), offsets)
    await asyncio.gather(learner.join_epoch(epoch), pool.join_epoch(epoch))
    await pool.begin_receive(manifest)
    await learner.send()
    await pool.commit("1")


async def agreement(wire, pool, folder: Path, version: str) -> np.ndarray:
    """Log-probabilities of one fixed answer in `folder`, after the engine's own samples have been
    held against it. Batches are short, so that rounding stays far below the bound."""
    asked = replace(wire.prompt(1), prompt_id="formats")
    for completion in await wire.sample(pool, asked, 8, Sampling(1.0, 48)):
        assert {span.version for span in completion.version_spans} == {version}
        expected = wire.reference(folder, asked, completion, 1.0)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    fixed = replace(completion, token_ids=np.arange(20, 60, dtype=np.int32))
    return wire.reference(folder, asked, fixed, 1.0)
