"""The demo's trained weights: an engine's behaviour logprobs against the learner's own forward.

The other tests of the engine ask transformers about random weights. Here it is what a training step
compares: packed documents, the chunked log-probabilities, the policy's temperature.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.data.chat import load_tokenizer, make_prompt
from h1r_rl.grpo.build_batch import build_micro_batch, plan_train_batch
from h1r_rl.hybrid.load import load_policy
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TEMPERATURES = (0.6, 1.0, 1.3)
SAMPLES = 8
TOLERANCE = 1e-4  # float32
Asked = list[tuple[Prompt, list[Completion]]]


def held_out(folder: Path, count: int) -> list[Prompt]:
    from h1r_rl.data.sources import Problem

    rows = pq.read_table(folder / "data" / "evaluation.parquet").slice(0, count).to_pylist()
    tokenizer = load_tokenizer(folder / "sft-model", trust_remote_code=False)
    return [
        make_prompt(
            tokenizer,
            Problem(row["prompt_id"], row["messages"], row["verifier"], row["ground_truth"]),
            system_prompt=None,
        )
        for row in rows
    ]


def learner_logprobs(folder: Path, answers: Asked, temperature: float, version: int):
    """(engine's, learner's) logprobs of all answers' tokens, [N] each, in a step's own order."""
    from learners.deepspeed_engine import PolicyLogprobs
    from learners.train_step import batch_tensors

    groups, completions = [], {}
    for number, (prompt, found) in enumerate(sorted(answers, key=lambda a: a[0].prompt_id)):
        samples = [
            Sample(
                c.sample_index, len(c.token_ids), c.finish_reason, c.version_spans,
                Verdict(float(c.sample_index % 2)), None, c.sample_index,
            )
            for c in found
        ]  # fmt: skip
        groups.append(Group(prompt, tuple(samples), version))
        completions |= {(number, c.sample_index): c for c in found}
    plan = plan_train_batch(
        groups, AlgorithmConfig(), ranks=1, micro_batch_tokens=2048, learner_version=version,
        max_staleness=0,
    )  # fmt: skip
    policy = PolicyLogprobs(load_policy(folder), temperature=temperature, chunk_tokens=256)
    engine, learner, packed = [], [], 0
    for documents in plan.ranks[0]:
        batch = build_micro_batch(plan, documents, completions, None)
        packed += len(batch.document_starts) > 2
        with torch.no_grad():
            logprobs, _ = policy(*batch_tensors(batch, "cpu"))
        engine.append(batch.behaviour_logprobs[batch.loss_mask])
        learner.append(logprobs.numpy())
    assert packed and sum(map(len, engine)) == plan.num_target_tokens
    return np.concatenate(engine), np.concatenate(learner)


@pytest.fixture
async def engine(ray_cluster, demo_folder, rollout_config, weights_config):
    """One with the SFT model in it, as version 0, and room for a prompt of several cache blocks."""
    from actors.rollout_pool import RolloutPool

    pool = await RolloutPool.start(
        rollout_config.model_copy(update={"prefix_caching": True, "max_model_len": 512}),
        weights_config,
        model_folder=str(demo_folder / "sft-model"), seed=0, initial_version="0",
        run_name="trained", start_timeout_s=300,
    )  # fmt: skip
    yield pool
    await pool.close()


async def test_engine_and_learner_agree_on_trained_weights_through_an_update(
    engine, wire, demo_folder
):
    config = json.loads((demo_folder / "sft-model" / "config.json").read_text())
    assert config["lm_head_multiplier"] != 1 and len(set(config["ssm_multipliers"])) > 2
    (block,) = (await engine.ask_worker("block_tokens")).values()
    questions = held_out(demo_folder, 12)
    ids = np.resize(np.concatenate([q.token_ids for q in questions]), 2 * block + 9)
    served = Prompt("served before", 0, ids.astype(np.int32), "q", "math", "1")

    async def check(model: str, version: int, prompts: list[Prompt]) -> None:
        for temperature in TEMPERATURES:
            sampling = Sampling(temperature, 48)
            answers = [(p, await wire.sample(engine, p, SAMPLES, sampling)) for p in prompts]
            spans = {s.version for _, found in answers for c in found for s in c.version_spans}
            assert spans == {str(version)}
            folder = demo_folder / model
            of_engine, of_learner = learner_logprobs(folder, answers, temperature, version)
            np.testing.assert_allclose(of_engine, of_learner, atol=TOLERANCE, rtol=0)
            assert len(of_engine) > 200 and of_engine.std() > 0.1  # not certain of everything
            other = "sft-model" if model == "model" else "model"
            _, of_other = learner_logprobs(demo_folder / other, answers, temperature, version)
            assert np.abs(of_engine - of_other).max() > 0.1  # the two models do differ

    await check("sft-model", 0, [*questions[:6], served])
    assert (await engine.stats())["cached_tokens"] > 0  # asked once a temperature: it was cached
    await wire.push(engine, wire.Sender(demo_folder / "model"), "1")
    await check("model", 1, [served, *questions])  # the served one, six asked before, six new
