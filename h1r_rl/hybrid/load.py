"""A policy from a Hugging Face folder, refused where its numbers could not be trusted.

Invariant: what comes back computes what the folder's model computes: safetensors only, parameters
in the dtype asked for, and on CUDA the scan and convolution are the real kernels, because
transformers falls back to a slow path without sequence boundaries after a mild log line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from h1r_rl.errors import ConfigError, DataError
from h1r_rl.hybrid.boundaries import install_boundaries
from h1r_rl.hybrid.cuda_kernels import require_kernels
from h1r_rl.hybrid.experts import refuse_experts
from h1r_rl.hybrid.model_folder import FAMILIES, read_config, refuse_no_model

UNBOUNDED = (0.0, float("inf"))


def load_policy(
    folder: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> nn.Module:
    """Load a causal language model with parameters in `dtype`."""
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    refuse_experts(folder)
    if device.startswith("cuda"):
        _refuse_on_cuda(read_config(folder))
    refuse_no_model(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    install_boundaries(model)
    _as_engines_step(model, folder)
    return model.to(device)  # pyright: ignore[reportArgumentType]


def _as_engines_step(model: Any, folder: Path) -> None:
    """Step sizes of the scan without bounds, as vLLM computes them whatever the configuration says.

    transformers holds Nemotron-H's above `time_step_min`, the smallest *initial* one: an engine
    would be up to 1e-4 a token away from the learner.
    """
    limit = getattr(model.config, "time_step_limit", None)
    if limit is not None and tuple(limit) != UNBOUNDED:
        raise ConfigError(
            f"{folder}: expected time_step_limit (0, inf), found {tuple(limit)}: vLLM knows no "
            "bounds on step sizes, so that its answers would not be this model's"
        )
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = UNBOUNDED


def _refuse_on_cuda(config: dict[str, Any]) -> None:
    """Before minutes of loading: kernels that are not there, and one that computes another norm."""
    family = config.get("model_type")
    if family in FAMILIES:
        require_kernels(family)
    if family == "granitemoehybrid" and config.get("mamba_n_groups", 1) > 1:
        raise ConfigError(
            "GraniteMoeHybrid with mamba_n_groups > 1: mamba_ssm's training kernel (and vLLM) norm "
            "each group apart, transformers' own path all together; found mamba_n_groups "
            f"{config['mamba_n_groups']}, only 1 can be trained on CUDA"
        )


def output_head(model: Any) -> tuple[Tensor, float]:
    """(weight [V, H], multiplier): logits = hidden @ weight.T * multiplier."""
    config = model.config
    weight = model.get_output_embeddings().weight
    if config.model_type == "falcon_h1":
        return weight, float(config.lm_head_multiplier)
    if config.model_type == "granitemoehybrid":
        return weight, 1.0 / float(config.logits_scaling)
    if config.model_type == "nemotron_h":
        return weight, 1.0
    raise DataError(
        f"expected a falcon_h1, granitemoehybrid or nemotron_h model, found {config.model_type}"
    )
