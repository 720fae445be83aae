"""Settings of one vLLM engine from the run's configuration."""

from __future__ import annotations

from typing import Any

from actors.vllm_plugin import BACKENDS
from h1r_rl.config.schema import RolloutConfig, WeightsConfig


def forks_engine(config: RolloutConfig) -> bool:
    """Whether the engine is one process beside its actor, forked ready to run (`engine_fork`)."""
    return not config.num_gpus and config.tensor_parallel == 1


def engine_env(config: RolloutConfig) -> dict[str, str]:
    """Environment of the rollout actor's process; its engine processes inherit it."""
    env = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    if not config.num_gpus:
        if forks_engine(config):
            # The worker lives in the engine core's process. A process of its own, which vLLM's CPU
            # build insists on otherwise (so as to bind threads), costs a start and a hop a token.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if config.enforce_eager:
            # Else vLLM compiles the ranking of log-probabilities, with a C++ compiler.
            env["TORCH_COMPILE_DISABLE"] = "1"
        env |= {
            "OMP_NUM_THREADS": str(config.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_TARGET_DEVICE": "cpu",
        }
    return env


def engine_args(
    config: RolloutConfig,
    weights: WeightsConfig,
    *,
    model_folder: str,
    seed: int,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Keyword arguments of vLLM's AsyncEngineArgs.

    `processed_logprobs`: behaviour logprobs are those of the distribution sampled from. The SSM
    state's dtype is set by name: `auto` would be the model's.
    """
    args: dict[str, Any] = {
        "model": model_folder,
        "dtype": config.dtype,
        "seed": seed,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "mamba_ssm_cache_dtype": config.mamba_ssm_cache_dtype,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": config.enforce_eager,
        "trust_remote_code": trust_remote_code,
        "enable_logging_iteration_details": True,  # for `engine_stats`; nothing of it is printed
        "generation_config": "vllm",  # sampling comes from our requests alone
        "weight_transfer_config": {"backend": BACKENDS[weights.backend]},
        "worker_extension_cls": "actors.weight_receiver.WorkerExtension",
    }
    if forks_engine(config):
        args["distributed_executor_backend"] = "uni"
    if config.num_gpus:
        args["gpu_memory_utilization"] = config.gpu_memory_utilization
    elif config.kv_cache_gib is not None:
        args["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
    return args
