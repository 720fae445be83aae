"""What saves memory changes no result: sharding, offload and checkpointing give the plain step;
bfloat16 is autocast over float32 parameters, which stay float32 to the export."""

from __future__ import annotations

import itertools
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h1r_rl.config.schema import AlgorithmConfig, LearnerConfig, OptimizerConfig
from h1r_rl.grpo.build_batch import plan_train_batch
from h1r_rl.hybrid.tiny import build_tiny_model
from learners import deepspeed_engine
from learners.deepspeed_engine import apply_gradients, build_engine
from learners.export import export_folder
from learners.train_step import run_plan

PRESETS = runpy.run_path(str(Path(__file__).with_name("test_presets_train.py")))
NUMBER = itertools.count()
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_learner):
    folder = tmp_path_factory.mktemp("memory") / "tiny"
    build_tiny_model(PRESETS["SMALL"], folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """(exported weights, loss) after two steps under given settings."""
    groups, answers = PRESETS["groups_and_answers"]()
    plan = plan_train_batch(
        groups, AlgorithmConfig(), ranks=1, micro_batch_tokens=60, learner_version=0,
        max_staleness=STEPS,
    )  # fmt: skip
    before = PRESETS["logprobs_of"](PRESETS["policy"](folder), plan, answers)
    sampled = {k: replace(a, logprobs=before[k]) for k, a in answers.items()}

    def train(seen=None, **settings):
        """`seen(engine, policy)` looks at the engine after the steps."""
        policy = PRESETS["policy"](folder)
        engine = build_engine(
            policy,
            LearnerConfig(**settings),
            OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        )
        for _ in range(STEPS):
            metrics = run_plan(
                engine, plan, sampled, algorithm=AlgorithmConfig(), reference=None,
                max_response_tokens=16,
            )  # fmt: skip
            norm, skipped = apply_gradients(engine)
            assert norm > 0 and not skipped
        if seen is not None:
            seen(engine, policy)
        target = folder.parent / f"trained-{next(NUMBER)}"
        sharded = settings.get("zero_stage") == 3
        export_folder(policy.model, folder, target, sharded=sharded)
        return load_file(target / "model.safetensors"), metrics

    return train


@pytest.fixture(scope="module")
def plain(trained):
    return trained()


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 2, "offload_optimizer": True, "gradient_checkpointing": True},
        {"zero_stage": 3, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_the_step_is_the_plain_one(folder, trained, plain, settings):
    weights, metrics = trained(**settings)
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], rel=1e-4, abs=1e-6)
    start = load_file(folder / "model.safetensors")
    for name, expected in plain[0].items():
        # As vectors: Adam turns the rounding of a vanishing gradient into a whole step.
        moved = (expected - start[name]).norm()
        assert (weights[name] - expected).norm() <= 2e-2 * moved + 1e-7, name


@pytest.mark.parametrize("on", [False, True])
def test_checkpointing_computes_layers_again(folder, one_learner, on):
    policy = PRESETS["policy"](folder)
    engine = build_engine(
        policy, LearnerConfig(gradient_checkpointing=on), OptimizerConfig(learning_rate=1e-3)
    )
    passes = Counter()
    for name, module in policy.model.named_modules():
        if name.endswith("q_proj"):
            module.register_forward_hook(lambda m, *_, n=name: passes.update([n]))
    starts = torch.tensor([0, 20])
    logprobs, _ = engine(torch.arange(1, 21), starts, torch.arange(1, 20))
    engine.backward(logprobs.sum())
    assert len(passes) == 2 and set(passes.values()) == {2 if on else 1}
    apply_gradients(engine)


@pytest.mark.parametrize(
    ("zero_stage", "offloaded"), [(0, False), (1, False), (2, True), (3, False), (3, True)]
)
def test_sharding_and_offload_are_what_deepspeed_does(trained, zero_stage, offloaded):
    classes = {
        0: "AdamW", 1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer",
        3: "DeepSpeedZeroOptimizer_Stage3",
    }  # fmt: skip

    def seen(engine, policy):
        assert type(engine.optimizer).__name__ == classes[zero_stage]
        if zero_stage in (1, 2):
            assert engine.optimizer.cpu_offload == offloaded
            assert engine.optimizer.partition_gradients == (zero_stage == 2)
        if zero_stage == 3:
            assert engine.optimizer.offload_optimizer == offloaded
        sharded = [hasattr(p, "ds_tensor") for p in policy.parameters()]
        assert all(sharded) if zero_stage == 3 else not any(sharded)

    trained(seen, zero_stage=zero_stage, offload_optimizer=offloaded)


def test_sharded_parameters_are_held_in_parts_between_steps(nothing_stays_whole, trained):
    def seen(engine, policy):
        assert {p.numel() for p in policy.parameters()} == {0}
        assert all(p.ds_tensor.numel() > 0 for p in policy.parameters())

    trained(seen, zero_stage=3)


@pytest.fixture
def nothing_stays_whole(monkeypatch):
    """ZeRO-3 as with matrices of a real size: DeepSpeed leaves parameters under 100,000 whole."""

    def config(*given):
        made = deepspeed_engine_config(*given)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    deepspeed_engine_config = deepspeed_engine.deepspeed_config
    monkeypatch.setattr(deepspeed_engine, "deepspeed_config", config)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bfloat16_is_over_float32_masters(nothing_stays_whole, trained, plain, zero_stage):
    products = []

    def seen(engine, policy):
        layer = next(m for n, m in policy.model.named_modules() if n.endswith("q_proj"))
        hook = layer.register_forward_hook(lambda m, _, out: products.append(out.dtype))
        engine(torch.arange(1, 21), torch.tensor([0, 20]), torch.arange(1, 20))
        hook.remove()

    weights, metrics = trained(seen, zero_stage=zero_stage, autocast="bfloat16")
    assert products == [torch.bfloat16] and metrics["loss"] != plain[1]["loss"]
    assert metrics["logprob_gap"] == pytest.approx(plain[1]["logprob_gap"], abs=0.05)
    for name, found in weights.items():
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float()), f"{name} was rounded"
