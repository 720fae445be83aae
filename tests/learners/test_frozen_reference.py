"""A learner rank with a KL term, without Ray around it: equal weights have no divergence, whatever
the precision they are computed in, and trained ones have."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from h1r_rl.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig, WeightsConfig
from h1r_rl.grpo.build_batch import plan_train_batch
from h1r_rl.hybrid.tiny import build_tiny_model
from learners.learner_actor import LearnerActor

PRESETS = runpy.run_path(str(Path(__file__).with_name("test_presets_train.py")))
ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_learner):
    folder = tmp_path_factory.mktemp("reference") / "tiny"
    build_tiny_model(PRESETS["SMALL"], folder, seed=3)
    return folder


@pytest.mark.parametrize("engine_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_equal_weights_have_no_divergence(folder, monkeypatch, autocast, engine_dtype):
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "0")  # put back when the rank has set its own
    algorithm = AlgorithmConfig(kl={"coefficient": 0.1, "estimator": "k2"})
    learner = LearnerConfig(autocast=autocast, micro_batch_tokens=60)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    groups, answers = PRESETS["groups_and_answers"]()
    plan = plan_train_batch(
        groups, algorithm, ranks=1, micro_batch_tokens=60, learner_version=0, max_staleness=2
    )
    before = PRESETS["logprobs_of"](PRESETS["policy"](folder), plan, answers)
    sampled = {k: replace(a, logprobs=before[k]) for k, a in answers.items()}
    rank: Any = LearnerActor.__ray_metadata__.modified_class(0, learner, optimizer)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(rank, "_fetch", lambda plan: sampled)
    rank.load(
        ("127.0.0.1", 0), str(folder), algorithm=algorithm, temperature=0.85,
        max_response_tokens=PRESETS["MAX_TOKENS"], total_steps=3, weights=WeightsConfig(), seed=0,
        initial_version=0, trust_remote_code=False, engine_dtype=engine_dtype,
    )  # fmt: skip
    found = []
    for _ in range(2):
        found.append(rank.forward_backward(plan)["kl_reference"])
        assert not rank.optimizer_step().skipped
    assert found[0] < 1e-12 and found[1] > 1e-6, found
