"""Named sets of algorithm settings; what the user writes out wins."""

from __future__ import annotations

from typing import Any

from h1r_rl.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, 2402.03300: symmetric clip, mean over answers, KL to the reference.
    "grpo": {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "sequence_mean",
        "kl": {"coefficient": 0.04, "estimator": "k3"},
    },
    # 2503.20783: no std, constant denominator.
    "dr-grpo": {
        "advantage": "dr_grpo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "constant",
    },
    # 2503.14476: clip higher, token mean, no KL; dynamic sampling is the loop's backfill.
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
    # 2507.18071: sequence-level ratio.
    "gspo": {
        "policy_loss": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "sequence_mean",
    },
    # 2506.13585, upper bound as in 2510.13786.
    "cispo": {
        "policy_loss": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "aggregation": "token_mean",
    },
    # 2601.02346: TIS with cap 2, no KL, cross-entropy on positives (0.1: VAPO's value).
    "falcon-h1r": {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "sequence_mean",
        "proximal": "recompute",
        "correction": {"kind": "tis", "level": "token", "cap": 2.0},
        "positive_ce": 0.1,
    },
}


def apply_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The raw `grpo` section with the preset's algorithm settings under the explicit ones."""
    name = raw.get("preset")
    if name is None:
        return raw
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"grpo.preset: expected one of {sorted(PRESETS)}, found {name!r}")
    explicit = raw.get("algorithm") or {}
    if not isinstance(explicit, dict):
        return raw  # refused with its place when the section is validated
    return raw | {"algorithm": _under(PRESETS[name], explicit)}


def _under(preset: dict[str, Any], explicit: dict[str, Any]) -> dict[str, Any]:
    """`explicit` over `preset`, subsections merged rather than replaced. Another loss than the
    preset's comes with bounds of its own (`AlgorithmConfig`)."""
    if explicit.get("policy_loss", preset.get("policy_loss", "clip")) != preset.get(
        "policy_loss", "clip"
    ):
        preset = {k: v for k, v in preset.items() if k not in ("clip_low", "clip_high")}
    merged = preset | explicit
    for name, value in explicit.items():
        if isinstance(value, dict) and isinstance(preset.get(name), dict):
            merged[name] = preset[name] | value
    return merged
