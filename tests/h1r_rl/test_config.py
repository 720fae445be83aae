"""Run files: every mistake is one short error that says expected, found, what to do."""

import pytest
import yaml

from cluster.check_machine import check_machine
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
        # Wrong in kind, not in size alone.
        ("grpo=[1]", ["'grpo': expected a section of settings, found [1]"]),
        ("GRPO.steps=3", ["did you mean 'grpo'?"]),
        ("rollout.max_staleness=2", ["did you mean 'grpo.max_staleness'?"]),  # another section's
        ("data.rl=x.parquet", ["'data.rl': expected a list"]),
        ("grpo.preset=[dapo]", ["grpo.preset", "['dapo']"]),
        ("grpo.algorithm.policy_loss=[clip]", ["policy_loss", "'gspo'", "['clip']"]),
        ("grpo.samples_per_prompt=true", ["samples_per_prompt", "integer", "True"]),
        ("grpo.samples_per_prompt='8'", ["samples_per_prompt", "integer", "'8'"]),
        ("grpo.optimizer.learning_rate=true", ["learning_rate': expected a number", "True"]),
        ("grpo.optimizer.learning_rate=.inf", ["learning_rate", "finite", "inf"]),
        ("grpo.optimizer.learning_rate=.nan", ["learning_rate", "finite", "nan"]),
        ("grpo.optimizer.betas=[0.9, 1]", ["betas.1", "less than 1"]),
        ("rollout.enforce_eager='no'", ["enforce_eager", "boolean"]),
        ("seed=-1", ["seed", "-1"]),
        ("seed=1000000000000000", ["seed", "less than"]),
        ("name=a/b", ["plain folder name"]),
        ("name='..'", ["plain folder name"]),
        ('name="a\\0b"', ["plain folder name"]),
        (f"name={'n' * 300}", ["plain folder name"]),
        ("output=~nobody-of-this-name/runs", ["'output': expected a path below a home folder"]),
        ('output="a\\0b"', ["'output': expected a path"]),
        (f"data.rl=[{'n' * 300}]", ["'data.rl.0': expected a path"]),
        ("cluster.address=head", ["cluster.address", "http://head:8265"]),
        ("reward.sandbox.http=[]", ["'reward.sandbox.http'", "at least one"]),
        ("reward.sandbox.http=x:1", ["http://host:8080", "'x:1'"]),
        ("evaluation.settings=[{name: mean_length, temperature: 0}]", ["settings.0.name"]),
        ("evaluation.settings=[{name: 'pass@8', temperature: 0}]", ["settings.0.name"]),
        ("evaluation.settings=[{name: a}]", ["settings.0.temperature' is missing; set it (0 is"]),
        ("model.tiny.head_dim=31", ["head_dim", "31", "even"]),
        ("model.tiny.mamba_n_groups=3", ["mamba_heads (8)", "mamba_n_groups (3)"]),
        ("grpo.steps=" + "[" * 2000, ["grpo.steps=[", "not valid YAML"]),
        ("grpo.steps=2020-99-99", ["not valid YAML"]),
    ],
)
def test_mistakes(tmp_path, override, words):
    """One line without a trace, whatever the value is."""
    with pytest.raises(ConfigError) as error:
        load(tmp_path, override)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "found nothing; give a YAML file"),
        ("- a\n- b", "found list"),
        ("? [a, b]\n: 1", "unhashable"),
        ("name: a\nname: b", "stands twice"),
        ("grpo: {steps: 1, steps: 2}", "stands twice"),
        (RUN + "1: 2", "unknown key 1"),
        ("[" * 2000, "nested too deeply"),
        ("a: *b", "undefined alias"),
        ("a: !!python/object/apply:os.getpid []", "not valid YAML"),
    ],
)
def test_odd_files(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_run(file)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(tmp_path, "output=~/mine").output == tmp_path / "mine"


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
    with pytest.raises(ConfigError, match="unwarned"):  # above the dtypes' own bound
        load(tmp_path, "grpo.logprob_gap_warn=1.0")


@pytest.mark.parametrize(("gpus", "refused"), [(4, True), (5, False)])
def test_engines_that_this_machines_gpus_cannot_place_are_refused(
    tmp_path, monkeypatch, gpus, refused
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    settings = ("rollout.autoscale={max: 2}", "rollout.num_gpus=2", "learner.num_gpus=1")
    remote = ("cluster.address=http://head:8265", "rollout.autoscale.max=99")
    check_machine(load(tmp_path, *settings, *remote))
    if not refused:
        check_machine(load(tmp_path, *settings))
        return
    with pytest.raises(ConfigError, match="autoscale.max 4 and learner.ranks 1 .* has 4 GPUs"):
        check_machine(load(tmp_path, *settings))


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
