"""Which layers of each family adapters may go on.

Invariant: a layer is here exactly when our forward pass calls it as a module, on CPUs and on CUDA.
The fused scan on CUDA reads `conv1d` and `out_proj` of a Mamba mixer as plain weights, and the loss
the output head: an adapter on these would never be computed with.
"""

from __future__ import annotations

from h1r_rl.config.schema import LoraConfig
from h1r_rl.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {
    "falcon_h1": (*ATTENTION, "gate_proj", "up_proj", "down_proj", "in_proj"),
    "granitemoehybrid": (*ATTENTION, "input_linear", "output_linear", "in_proj"),
    "nemotron_h": (*ATTENTION, "up_proj", "down_proj", "in_proj"),
}
REFUSED = {
    "conv1d": "the fused scan reads its weight directly",
    "out_proj": "the fused scan reads its weight directly",
    "lm_head": "the loss reads its weight directly",
}


def target_modules(lora: LoraConfig, model_type: str) -> tuple[str, ...]:
    """Names of the adapted layers of a model of this type, or ConfigError."""
    known = TARGETS.get(model_type)
    if known is None:
        raise ConfigError(
            f"model.lora: expected a model of {', '.join(TARGETS)}, found {model_type}; train it "
            "whole"
        )
    if lora.target_modules is None:
        return known
    for name in lora.target_modules:
        if name in REFUSED:
            raise ConfigError(
                f"model.lora.target_modules: {name} cannot have an adapter, as {REFUSED[name]} and "
                f"would not see it; choose from {', '.join(known)}"
            )
        if name not in known:
            raise ConfigError(
                f"model.lora.target_modules: {model_type} has no projection '{name}'; choose from "
                f"{', '.join(known)}"
            )
    return lora.target_modules
