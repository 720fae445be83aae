"""Rules that span fields: everything that can be known to be wrong before anything starts."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from h1r_rl.config.lora_targets import target_modules
from h1r_rl.config.parallel_sizes import heads_of_folder, heads_of_tiny
from h1r_rl.config.schema import ClusterConfig, RunConfig, TinyModelConfig
from h1r_rl.errors import ConfigError
from h1r_rl.grpo.tripwires import gap_bounds
from h1r_rl.hybrid.model_folder import read_config


def check_run(config: RunConfig) -> None:
    """Raise ConfigError on the first rule broken."""
    _check_model(config)
    _check_data(config)
    _check_lengths(config)
    _check_sampling(config)
    _check_parallelism(config)
    _check_autoscale(config)
    _check_algorithm(config)
    _check_room(config)


def _check_model(config: RunConfig) -> None:
    model = config.model
    if (model.path is None) == (model.tiny is None):
        found = "neither" if model.path is None else "both"
        raise ConfigError(
            f"model: expected exactly one of 'path' and 'tiny', found {found}; set one"
        )
    model_type = str(read_config(model.path).get("model_type")) if model.path else "falcon_h1"
    if model.tiny:
        _check_widths(model.tiny)
    if model.tiny and config.rollout.max_model_len > model.tiny.max_position:
        raise ConfigError(
            f"rollout.max_model_len ({config.rollout.max_model_len}) is beyond "
            f"model.tiny.max_position ({model.tiny.max_position}); lower the first"
        )
    if model.lora is not None:
        target_modules(model.lora, model_type)
        if config.learner.zero_stage == 3:
            raise ConfigError(
                "model.lora: expected learner.zero_stage 0, 1 or 2, found 3: there ranks send "
                "shards, and an adapter merges with a whole weight. Frozen weights have neither "
                "gradients nor optimizer state to shard; set zero_stage to 2"
            )


def _check_widths(tiny: TinyModelConfig) -> None:
    for name, parts in (("num_heads", "num_kv_heads"), ("mamba_heads", "mamba_n_groups")):
        whole, by = getattr(tiny, name), getattr(tiny, parts)
        if whole % by:
            raise ConfigError(
                f"model.tiny.{name} ({whole}) does not divide over {parts} ({by}); set {name} to a "
                "multiple"
            )
    if tiny.head_dim % 2:
        raise ConfigError(
            f"model.tiny.head_dim: expected an even number, found {tiny.head_dim}: rotary "
            "positions turn pairs; set it to the next even one"
        )


def _check_data(config: RunConfig) -> None:
    data = config.data
    files = {
        "sft": data.sft,
        "rl": data.rl,
        "evaluation": data.evaluation,
        "evaluation_code": data.evaluation_code,
    }
    if data.generate is not None:
        if any(files.values()):
            raise ConfigError("data: expected either 'generate' or files, found both; drop one")
        if data.generate.min_operands > data.generate.max_operands:
            raise ConfigError("data.generate: min_operands is larger than max_operands; swap them")
        return
    needed = {"sft": config.sft is not None, "rl": config.grpo is not None, "evaluation": True}
    for split, paths in files.items():
        if needed.get(split) and not paths:
            raise ConfigError(f"data.{split}: expected at least one file; name it, or set generate")
        for path in paths:
            if not Path(path).is_file():
                found = "is a folder" if Path(path).is_dir() else "does not exist"
                raise ConfigError(f"data.{split}: expected a file, but {path} {found}; correct it")


def _check_lengths(config: RunConfig) -> None:
    rollout = config.rollout
    limit = config.evaluation.max_response_tokens or rollout.max_response_tokens
    if max(limit, rollout.max_response_tokens) >= rollout.max_model_len:
        raise ConfigError(
            f"rollout.max_model_len ({rollout.max_model_len}) leaves no room for a prompt beside "
            f"max_response_tokens ({max(limit, rollout.max_response_tokens)}); raise the first"
        )
    if config.sft and config.model.tiny and config.sft.max_length > config.model.tiny.max_position:
        raise ConfigError(
            f"sft.max_length ({config.sft.max_length}) is beyond the model's context "
            f"({config.model.tiny.max_position}); lower sft.max_length"
        )


def _check_sampling(config: RunConfig) -> None:
    if config.rollout.top_p < 1:
        raise ConfigError(
            f"rollout.top_p: expected 1.0, found {config.rollout.top_p}; truncated sampling makes "
            "the importance ratio undefined; set it to 1 (evaluation settings may use less)"
        )
    names = [setting.name for setting in config.evaluation.settings]
    if len(set(names)) != len(names):
        raise ConfigError(f"evaluation.settings: names must differ, found {names}; rename one")
    for setting in config.evaluation.settings:
        if setting.pass_at and setting.pass_at > setting.samples:
            raise ConfigError(
                f"evaluation setting '{setting.name}': pass_at ({setting.pass_at}) needs at least "
                f"as many samples, found {setting.samples}; raise samples"
            )


def _check_parallelism(config: RunConfig) -> None:
    learner, rollout = config.learner, config.rollout
    for section, batch in (
        ("sft.batch_size", config.sft.batch_size if config.sft else None),
        (
            "grpo.prompts_per_step x samples_per_prompt",
            config.grpo.prompts_per_step * config.grpo.samples_per_prompt if config.grpo else None,
        ),
    ):
        if batch is not None and batch < learner.ranks:
            raise ConfigError(
                f"{section} = {batch} gives some of learner.ranks ({learner.ranks}) no sample; "
                f"set learner.ranks to at most {batch}"
            )
    if learner.offload_optimizer and learner.zero_stage == 0:
        raise ConfigError(
            "learner.offload_optimizer needs zero_stage 1, 2 or 3, found 0; set it, "
            "or leave the optimizer where it is"
        )
    if config.weights.backend == "nccl" and not (rollout.num_gpus and learner.num_gpus):
        raise ConfigError(
            "weights.backend: nccl needs GPUs on both sides; set rollout.num_gpus and "
            "learner.num_gpus, or backend: gloo"
        )
    _check_tensor_parallel(config)


def _check_tensor_parallel(config: RunConfig) -> None:
    rollout, model = config.rollout, config.model
    if rollout.tensor_parallel == 1:
        return
    heads = heads_of_tiny(model.tiny) if model.tiny else heads_of_folder(Path(model.path or ""))
    if rollout.tensor_parallel not in heads.sizes():
        raise ConfigError(
            f"rollout.tensor_parallel ({rollout.tensor_parallel}) does not divide the model's "
            f"heads (attention {heads.attention}, key/value {heads.key_value}, Mamba "
            f"{heads.mamba} in {heads.mamba_groups} groups, MLP {heads.intermediate}); sizes that "
            f"work: {heads.sizes()}"
        )
    if rollout.num_gpus and rollout.num_gpus < rollout.tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel ({rollout.tensor_parallel}) needs a GPU a rank, found "
            f"rollout.num_gpus = {rollout.num_gpus:g}; set it to {rollout.tensor_parallel}"
        )


def _check_autoscale(config: RunConfig) -> None:
    rollout, bounds = config.rollout, config.rollout.autoscale
    if bounds is None:
        return
    if bounds.min > bounds.max:
        raise ConfigError(
            f"rollout.autoscale: expected min <= max, found {bounds.min} and {bounds.max}; swap "
            "them"
        )
    if not bounds.min <= rollout.actors <= bounds.max:
        raise ConfigError(
            f"rollout.actors ({rollout.actors}) lies outside rollout.autoscale ({bounds.min} to "
            f"{bounds.max}), which it starts from; set it to a number between them"
        )


def _check_algorithm(config: RunConfig) -> None:
    if config.grpo is None:
        return
    algorithm = config.grpo.algorithm
    corrected = algorithm.correction.kind != "none"
    if algorithm.proximal == "behaviour" and corrected:
        raise ConfigError(
            "grpo.algorithm: correction belongs to proximal: recompute; with proximal: behaviour "
            "the ratio already is against the engine's policy. Drop one of the two"
        )
    if algorithm.proximal == "recompute" and not corrected and config.grpo.max_staleness:
        raise ConfigError(
            "grpo.algorithm: proximal: recompute without a correction neither clips nor weighs "
            f"what older weights sampled (grpo.max_staleness is {config.grpo.max_staleness}); set "
            "correction.kind to tis or mask, or proximal: behaviour"
        )
    if algorithm.proximal == "recompute" and algorithm.policy_loss in ("dual_clip", "gspo"):
        raise ConfigError(
            f"grpo.algorithm: policy_loss: {algorithm.policy_loss} bounds the ratio to the "
            "proximal policy, which is 1 with proximal: recompute and one optimizer step a batch; "
            "use proximal: behaviour, or policy_loss: clip"
        )
    if algorithm.advantage_std == "batch" and algorithm.advantage != "grpo":
        raise ConfigError(
            "grpo.algorithm: advantage_std: batch belongs to advantage: grpo; "
            f"{algorithm.advantage} divides by no std. Drop one of the two"
        )
    if algorithm.policy_loss != "cispo" and algorithm.clip_low > 1:
        raise ConfigError(
            f"grpo.algorithm.clip_low: expected at most 1 (a ratio is positive), found "
            f"{algorithm.clip_low:g}; lower it"
        )
    warn, stop = gap_bounds(config.grpo, config.rollout, config.learner)
    if warn > stop:
        raise ConfigError(
            f"grpo.logprob_gap_warn ({warn:g}) lies above logprob_gap_stop ({stop:g}): the run "
            "would stop unwarned; lower it"
        )
    limits = config.grpo.tripwires
    if limits.entropy_fall >= limits.entropy_rise:
        raise ConfigError(
            f"grpo.tripwires: expected entropy_fall < entropy_rise, found {limits.entropy_fall:g} "
            f"and {limits.entropy_rise:g}: every entropy would be an alarm"
        )
    cache, room = config.reward.overlong_cache_tokens, config.rollout.max_response_tokens
    if cache and cache >= room:
        raise ConfigError(
            f"reward.overlong_cache_tokens ({cache}) reaches rollout.max_response_tokens ({room}): "
            "every answer would be punished for its length; lower it"
        )
    if config.data.default_verifier == "judge" and config.reward.judge is None:
        raise ConfigError(
            "data.default_verifier: judge needs a model that judges; set reward.judge.url and "
            "reward.judge.model"
        )
    if not 0 < algorithm.correction.low <= algorithm.correction.high:
        raise ConfigError(
            "grpo.algorithm.correction: expected 0 < low <= high, found low "
            f"{algorithm.correction.low:g} and high {algorithm.correction.high:g}; correct them"
        )
    if config.reward.control == "none" and importlib.util.find_spec("math_verify") is None:
        raise ConfigError("rewards need the package math-verify; run `make setup`")


def _check_room(config: RunConfig) -> None:
    """A service that no CPU is left for would wait for its start until the deadline."""
    if config.cluster.address != "local":
        return
    rollout, reward, learner = config.rollout, config.reward, config.learner
    engines, most = most_engines(config)
    ranks = learner.ranks if config.grpo else 0
    there = embedded_cpus(config.cluster)
    asked = {
        engines: most * rollout.num_cpus,
        "reward.workers": reward.workers * reward.num_cpus,
        "learner.ranks": ranks * learner.num_cpus,
    }
    if sum(asked.values()) > there:
        raise ConfigError(
            f"cluster.num_cpus: the embedded Ray has {there} CPUs to hand out, but {_sum(asked)} "
            "are asked for; raise cluster.num_cpus (services may share cores) or lower their "
            "num_cpus"
        )


def most_engines(config: RunConfig) -> tuple[str, int]:
    """Rollout actors that a run may have at once, and the setting that says so."""
    rollout = config.rollout
    if rollout.autoscale and config.grpo:
        return "rollout.autoscale.max", rollout.autoscale.max
    return "rollout.actors", rollout.actors


def _sum(asked: dict[str, float]) -> str:
    parts = " + ".join(f"{name} {amount:g}" for name, amount in asked.items())
    return f"{parts} = {sum(asked.values()):g}"


def embedded_cpus(cluster: ClusterConfig) -> int:
    """CPUs that an embedded Ray hands out, at least the services of a small run."""
    return cluster.num_cpus or max(4, os.cpu_count() or 1)
