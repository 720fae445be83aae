"""Learning rate as a pure function of the step, set by us so that it survives every restart."""

from __future__ import annotations

import math

from h1r_rl.config.schema import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up, then the schedule."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    progress = min(progress, 1.0)
    share = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_lr_ratio + (1 - config.final_lr_ratio) * share)
