"""Whether a folder's hybrid has expert layers, which are not carried yet.

Invariant: known from config.json alone, before torch or a tensor is read. A router's correction
bias is a buffer, which neither the export nor the wire takes along, and fused experts have other
names in vLLM's loader than here: an engine would go on sampling from old ones without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from h1r_rl.errors import ConfigError
from h1r_rl.hybrid.model_folder import read_config

# transformers' defaults where config.json says nothing
GRANITE_EXPERTS = 8
NEMOTRON_LAYERS = ("linear_attention", "moe", "full_attention", "mlp")


def refuse_experts(folder: Path) -> None:
    """ConfigError for a model of which some layers are experts."""
    file = folder / "config.json"
    found = _experts(read_config(folder))
    if found:
        raise ConfigError(
            f"{file}: expected a hybrid without expert layers, found {found}: experts are not "
            "carried yet (their router's buffers and fused weights would reach neither the engines "
            "nor the export); use a dense variant, as granite-4.0-h-micro or Nemotron-H-8B"
        )


def _experts(config: dict[str, Any]) -> str:
    """What says so; empty for a dense model. Example: "num_local_experts 8"."""
    family = config.get("model_type")
    if family == "granitemoehybrid":
        experts = config.get("num_local_experts", GRANITE_EXPERTS)
        return f"num_local_experts {experts}" if experts else ""
    if family == "nemotron_h":
        layers = config.get("layers_block_type") or config.get("layer_types")
        if layers is None:  # the form of older folders: M, *, - and E, a letter a layer
            pattern = config.get("hybrid_override_pattern")
            layers = ["moe" if c == "E" else c for c in pattern] if pattern else NEMOTRON_LAYERS
        experts = list(layers).count("moe")
        return f"{experts} of {len(layers)} layers of type moe" if experts else ""
    return ""
