"""Run files: every mistake is one short error that says expected, found, what to do."""

import pytest
import yaml

from h1r_rl.config.load import build_run, dump_run, load_run
from h1r_rl.errors import ConfigError
from h1r_rl.grpo.presets import PRESETS

RUN = """
name: t
model: {tiny: {}}
data: {generate: {}}
sft: {steps: 2, batch_size: 8, max_length: 96}
grpo: {steps: 2, prompts_per_step: 4, samples_per_prompt: 4}
rollout: {max_response_tokens: 32, max_model_len: 96, dtype: float32}
"""


def load(tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return load_run(file, overrides)


def test_overrides_and_round_trip(tmp_path):
    config = load(tmp_path, "grpo.steps=7", "learner.ranks=2")
    assert config.grpo.steps == 7 and config.learner.ranks == 2
    assert build_run(yaml.safe_load(dump_run(config)), source="dump") == config


def test_adapters_want_whole_weights(tmp_path):
    assert load(tmp_path, "model.lora={}", "learner.zero_stage=2").model.lora.rank == 16
    with pytest.raises(ConfigError, match="zero_stage 0, 1 or 2, found 3"):
        load(tmp_path, "model.lora={}", "learner.zero_stage=3")


@pytest.mark.parametrize(
    "override, words",
    [
        ("grpo.step=3", ["grpo.step", "did you mean 'steps'"]),
        ("grpo.samples_per_prompt=1", ["samples_per_prompt", "1"]),
        ("rollout.top_p=0.9", ["rollout.top_p", "0.9", "ratio"]),
        ("rollout.max_model_len=32", ["max_model_len", "32"]),
        ("rollout.max_model_len=100000", ["max_position"]),
        ("sft.max_length=4096", ["sft.max_length", "4096"]),
        ("rollout.tensor_parallel=3", ["tensor_parallel", "[1, 2, 4]"]),
        ("learner.ranks=64", ["learner.ranks", "64"]),
        ("data.rl=[missing.parquet]", ["data", "both"]),
        ("model.path=nowhere", ["exactly one"]),
        ("grpo.preset=nope", ["grpo.preset", "nope"]),
        ("weights.backend=nccl", ["nccl", "num_gpus"]),
        ("grpo.algorithm.correction.kind=tis", ["recompute", "one of the two"]),
        ("grpo", ["key=value"]),
        ("grpo.algorithm.proximal=recompute", ["neither clips nor weighs", "max_staleness is 1"]),
        ("grpo.algorithm.clip_low=1.5", ["clip_low", "1.5"]),
        ("grpo.tripwires.entropy_rise=0.05", ["entropy_fall", "0.05"]),
        ("model.lora.target_modules=[in_proj, out_proj]", ["out_proj", "fused scan", "q_proj"]),
        ("model.lora.target_modules=[]", ["target_modules"]),
        ("model.lora.rank=0", ["model.lora.rank", "0"]),
        ("reward.overlong_cache_tokens=64", ["64", "max_response_tokens (32)"]),
        ("data.default_verifier=judge", ["reward.judge.url", "reward.judge.model"]),
        ("reward.judge={url: nowhere, model: m}", ["reward.judge.url", "http://host:8000/v1"]),
        ("rollout.autoscale={min: 3, max: 2}", ["min <= max", "3 and 2"]),
        ("rollout.autoscale={min: 0, max: 2}", ["rollout.autoscale.min", "found 0"]),
        ("rollout.autoscale={min: 1}", ["'rollout.autoscale.max' is missing"]),
        ("rollout.autoscale={max: 2, maximum: 3}", ["did you mean 'max'"]),
        ("rollout.autoscale={min: 2, max: 3}", ["rollout.actors (1)", "(2 to 3)"]),
        ("rollout.autoscale={max: 99999}", ["cluster.num_cpus", "rollout.autoscale.max 99999"]),
    ],
)
def test_mistakes(tmp_path, override, words):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, override)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("advantage_std=batch", "advantage=rloo"), ["batch", "rloo"]),
        (("proximal=recompute", "correction.kind=tis", "policy_loss=gspo"), ["gspo", "recompute"]),
        (("proximal=recompute", "correction.kind=tis", "policy_loss=dual_clip"), ["dual_clip"]),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, overrides, words):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, *(f"grpo.algorithm.{override}" for override in overrides))
    assert all(word in str(error.value) for word in words)


def test_a_guard_that_stops_unwarned_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="unwarned"):
        load(tmp_path, "grpo.logprob_gap_warn=1.0", "grpo.logprob_gap_stop=0.1")


@pytest.mark.parametrize("gpus, refused", [(4, True), (5, False), (None, False)])
def test_engines_that_this_machines_gpus_cannot_place_are_refused(
    tmp_path, monkeypatch, gpus, refused
):
    monkeypatch.setattr("h1r_rl.config.checks.embedded_gpus", lambda: gpus)
    settings = ("rollout.autoscale={max: 2}", "rollout.num_gpus=2", "learner.num_gpus=1")
    if not refused:
        load(tmp_path, *settings)
        load(tmp_path, *settings, "cluster.address=http://head:8265", "rollout.autoscale.max=99")
        return
    with pytest.raises(ConfigError, match="has 4 GPUs.*autoscale.max 4 .* learner.ranks 1 = 5"):
        load(tmp_path, *settings)


@pytest.mark.parametrize("preset", [None, "grpo"])
def test_a_loss_named_alone_has_its_papers_bounds(tmp_path, preset):
    named = [f"grpo.preset={preset}"] if preset else []
    for loss, bounds in (("gspo", (3e-4, 4e-4)), ("cispo", (1.0, 4.0))):
        algorithm = load(tmp_path, *named, f"grpo.algorithm.policy_loss={loss}").grpo.algorithm
        assert (algorithm.clip_low, algorithm.clip_high) == bounds
    named += ["grpo.algorithm.policy_loss=gspo", "grpo.algorithm.clip_low=0.1"]
    assert load(tmp_path, *named).grpo.algorithm.clip_low == 0.1


def test_missing_file_and_missing_section(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="'model' is missing"):
        build_run({"name": "x", "data": {}, "rollout": {}}, source="x")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_load_and_explicit_settings_win(tmp_path, name):
    config = load(tmp_path, f"grpo.preset={name}", "grpo.algorithm.clip_high=0.5")
    assert config.grpo.algorithm.clip_high == 0.5
    for key, value in PRESETS[name].items():
        if key != "clip_high" and not isinstance(value, dict):
            assert getattr(config.grpo.algorithm, key) == value
