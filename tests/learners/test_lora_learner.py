"""Adapters alone are trained: on real ranks as on one device; what leaves is the whole model."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from h1r_rl.config.schema import (
    AlgorithmConfig,
    LearnerConfig,
    LoraConfig,
    OptimizerConfig,
    WeightsConfig,
)
from h1r_rl.grpo.build_batch import plan_train_batch
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.lora import adapted_layers, add_adapters
from h1r_rl.hybrid.tiny import build_tiny_model
from learners.export import export_folder
from learners.learner_actor import LearnerActor
from learners.weight_sender import manifest_of

HERE = Path(__file__).parent
GROUP = runpy.run_path(str(HERE / "test_learner_group.py"))
FORMATS = runpy.run_path(str(HERE.parent / "hybrid_formats.py"))
PRESETS = runpy.run_path(str(HERE / "test_presets_train.py"))
ENVIRONMENT = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(GROUP["SMALL"], folder, seed=3)
    return folder


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
async def test_life_of_a_learner_with_adapters(ray_cluster, model_folder, tmp_path, zero_stage):
    first = load_file(model_folder / "model.safetensors")
    batches = [GROUP["make_groups"](2, samples=3), GROUP["make_groups"](6, samples=4)]
    weights, losses, norms = GROUP["reference_steps"](model_folder, batches, sft=False, lora=LORA)
    learner = await GROUP["start"](model_folder, zero_stage=zero_stage, lora=LORA)
    try:
        whole = manifest_of(load_policy(model_folder), 1 << 20)
        assert (await learner.weight_manifest()).parameters == whole.parameters
        untrained = await GROUP["exported"](learner, tmp_path / "before")
        assert all(torch.equal(untrained[name], value) for name, value in first.items())
        for i, groups in enumerate(batches):
            plan = GROUP["make_plan"](groups, ranks=2, micro_batch_tokens=50)
            metrics = await learner.forward_backward(plan)
            result = await learner.optimizer_step()
            assert result.version == i + 1 and not result.skipped
            assert metrics["loss"] == pytest.approx(losses[i], rel=1e-4, abs=1e-6)
            assert result.metrics["grad_norm"] == pytest.approx(norms[i], rel=1e-3)
        held = await GROUP["exported"](learner, tmp_path / "after")
        GROUP["assert_same_update"](held, weights, first)
        moved = {name for name, value in held.items() if not torch.equal(value, first[name])}
        assert {name.split(".")[-2] for name in moved} == {
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj",
        }  # fmt: skip
        _exports_what_anybody_loads(held, tmp_path / "after", model_folder)
        await GROUP["_sends_what_it_holds"](learner, held)
        await GROUP["_skips_a_broken_step"](learner, held, tmp_path)
        await GROUP["_continues_from_its_checkpoint"](learner, held, tmp_path)
    finally:
        await learner.close()


def _exports_what_anybody_loads(held, folder: Path, base: Path) -> None:
    """A plain model; beside it the adapter, from which the same weights follow."""
    model = load_policy(folder)
    assert all(torch.equal(held[name], p) for name, p in model.named_parameters())
    first = load_file(base / "model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        merged = first[f"{name}.weight"] + config["lora_alpha"] / config["r"] * (b @ a)
        torch.testing.assert_close(held[f"{name}.weight"], merged, rtol=0, atol=1e-6)


@pytest.mark.proof  # peft is in no lock: it pulls accelerate, which changes how models are loaded
def test_peft_loads_the_adapter_onto_its_base(one_learner, tmp_path):
    peft = pytest.importorskip(
        "peft", reason="pip install --no-deps --target FOLDER peft accelerate, FOLDER in PYTHONPATH"
    )
    FORMATS["write_folder"]("34B", tmp_path / "base")
    model: Any = load_policy(tmp_path / "base")
    add_adapters(model, LORA, seed=0)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_()
    export_folder(model, tmp_path / "base", tmp_path / "out", sharded=False)
    base, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("base", "out"))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        expected = merged.eval()(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def rank_with(folder, monkeypatch, algorithm, lora, *, engine_dtype="float32", autocast="none"):
    """One learner rank without Ray around it; a group of one."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "0")  # put back when the rank has set its own
    learner = LearnerConfig(autocast=autocast, micro_batch_tokens=60)
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    rank: Any = LearnerActor.__ray_metadata__.modified_class(0, learner, optimizer)  # pyright: ignore[reportAttributeAccessIssue]
    rank.load(
        ("127.0.0.1", 0), str(folder), algorithm=algorithm, temperature=0.85,
        max_response_tokens=PRESETS["MAX_TOKENS"], total_steps=3, weights=WeightsConfig(), seed=0,
        initial_version=0, trust_remote_code=False, engine_dtype=engine_dtype, lora=lora,
    )  # fmt: skip
    return rank


@pytest.mark.parametrize(
    ("engine_dtype", "autocast"),
    [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "bfloat16")],
)
def test_grpo_step_learns_and_the_reference_beneath_stays(
    one_learner, model_folder, monkeypatch, engine_dtype, autocast
):
    algorithm = AlgorithmConfig(kl={"coefficient": 0.1, "estimator": "k2"})
    groups, answers = PRESETS["groups_and_answers"]()
    plan = plan_train_batch(
        groups, algorithm, ranks=1, micro_batch_tokens=60, learner_version=0, max_staleness=2
    )
    before = PRESETS["logprobs_of"](PRESETS["policy"](model_folder), plan, answers)
    sampled = {k: replace(a, logprobs=before[k]) for k, a in answers.items()}
    rank = rank_with(
        model_folder, monkeypatch, algorithm, LORA, engine_dtype=engine_dtype, autocast=autocast
    )
    monkeypatch.setattr(rank, "_fetch", lambda plan: sampled)
    base = {n: p.clone() for n, p in load_policy(model_folder).named_parameters()}
    found = []
    for _ in range(3):
        found.append(rank.forward_backward(plan)["kl_reference"])
        assert not rank.optimizer_step().skipped
    assert found[0] < 1e-12 and 1e-6 < found[1] < found[2], found
    policy = rank._engine.module
    for name, parameter in policy.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name]), name
        else:
            assert parameter.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16, autocast == "bfloat16"):
        after = PRESETS["logprobs_of"](policy, plan, answers)
    gain = {k: (after[k] - before[k]).mean() for k in answers}
    right, wrong = ([gain[k] for k in answers if k[1] % 2 == odd] for odd in (1, 0))
    assert sum(right) / len(right) > sum(wrong) / len(wrong) + 0.02
    ids = {id(p) for g in rank._engine.optimizer.param_groups for p in g["params"]}
    layers = adapted_layers(policy.model).values()
    assert ids == {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
