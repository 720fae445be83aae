"""Every preset, as YAML names it, trains on a real DeepSpeed engine: answers with a positive
advantage become likelier than those with a negative one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from h1r_rl.config.schema import (
    AlgorithmConfig,
    LearnerConfig,
    OptimizerConfig,
    TinyModelConfig,
)
from h1r_rl.grpo.build_batch import build_micro_batch, plan_train_batch
from h1r_rl.grpo.presets import PRESETS, apply_preset
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.tiny import build_tiny_model
from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict, VersionSpan
from learners.deepspeed_engine import PolicyLogprobs, apply_gradients, build_engine
from learners.frozen_reference import FrozenReference
from learners.train_step import batch_tensors, run_plan

SMALL = TinyModelConfig(
    hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
    mamba_heads=4, mamba_head_dim=16, mamba_d_state=16, mamba_chunk_size=8,
)  # fmt: skip
STEPS, MAX_TOKENS = 3, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_learner):
    folder = tmp_path_factory.mktemp("presets") / "tiny"
    build_tiny_model(SMALL, folder, seed=3)
    return folder


def policy(folder) -> PolicyLogprobs:
    return PolicyLogprobs(load_policy(folder), temperature=0.85, chunk_tokens=16)


def groups_and_answers():
    """Three prompts, four answers each, two of them right; some were cut at the limit."""
    rng = np.random.default_rng(0)
    groups, answers = [], {}
    for g in range(3):
        members = []
        for s in range(4):
            length = MAX_TOKENS if s == 3 else int(rng.integers(3, MAX_TOKENS))
            finish = "length" if s == 3 else "stop"
            ids = rng.integers(0, 256, length, dtype=np.int32)
            spans = (VersionSpan("0", 0, length),)
            logprobs = np.zeros(length, np.float32)
            answers[g, s] = Completion(s, ids, logprobs, spans, finish, "", "rollout-0")
            verdict = Verdict(float(s % 2), {"accuracy": float(s % 2)})
            members.append(Sample(s, length, finish, spans, verdict, None, s))
        prompt = Prompt(f"p{g}", 0, rng.integers(0, 256, 5, dtype=np.int32), "", "math", "1")
        groups.append(Group(prompt, tuple(members), 0))
    return groups, answers


def logprobs_of(model, plan, answers) -> dict[tuple[int, int], np.ndarray]:
    found = {}
    for key in answers:
        [document] = [d for b in plan.ranks[0] for d in b if (d.group, d.sample) == key]
        batch = build_micro_batch(plan, [document], answers, None)
        with torch.no_grad():
            found[key] = model(*batch_tensors(batch, "cpu"))[0].numpy()
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_preset_learns_what_was_rewarded(folder, name):
    algorithm = AlgorithmConfig(**apply_preset({"preset": name})["algorithm"])
    groups, answers = groups_and_answers()
    plan = plan_train_batch(
        groups, algorithm, ranks=1, micro_batch_tokens=60, learner_version=0, max_staleness=STEPS
    )
    assert len(plan.ranks[0]) > 1
    model = policy(folder)
    before = logprobs_of(model, plan, answers)
    sampled = {k: replace(a, logprobs=before[k]) for k, a in answers.items()}
    learner = LearnerConfig(micro_batch_tokens=60)
    reference = FrozenReference(policy(folder), learner) if algorithm.kl.coefficient else None
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
    engine = build_engine(model, learner, optimizer)
    norms = []
    for _ in range(STEPS):
        metrics = run_plan(
            engine, plan, sampled, algorithm=algorithm, reference=reference,
            max_response_tokens=MAX_TOKENS,
        )  # fmt: skip
        norm, skipped = apply_gradients(engine)
        assert not skipped and np.isfinite(metrics["loss"])
        norms.append(norm)
    assert norms[0] > 0 and np.isfinite(norms).all()  # gspo's narrow clip may end the later ones
    after = logprobs_of(model, plan, answers)
    gain = {k: (after[k] - before[k]).mean() for k in answers}
    right = np.mean([gain[k] for k in answers if k[1] % 2])
    wrong = np.mean([gain[k] for k in answers if not k[1] % 2])
    assert right > wrong + 0.02
