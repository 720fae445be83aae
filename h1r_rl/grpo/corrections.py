"""Weights of the proximal policy against the engine's, for proximal: recompute.

w_t = pi_prox / mu, where pi_prox is the learner's first forward of the step and mu the engine's
recorded policy. Every function maps [N] w to ([N] weight of the token's loss, [N] bool where w was
cut); w carries no gradient. With proximal: behaviour there is no w, and asking for both is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from h1r_rl.config.schema import CorrectionConfig


def truncated(w: Tensor, cap: float = 2.0) -> tuple[Tensor, Tensor]:
    """TIS: min(w, cap). Biased where it cuts; Falcon-H1R (2601.02346) caps at 2, the default."""
    return w.clamp(max=cap), w > cap


def masked(w: Tensor, low: float = 0.5, high: float = 5.0) -> tuple[Tensor, Tensor]:
    """IcePop (Ring-1T, 2510.18855): w inside [low, high], else the token is dropped: weight 0."""
    outside = (w < low) | (w > high)
    return torch.where(outside, torch.zeros_like(w), w), outside


def correction_weight(w: Tensor, correction: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """The one that `correction.kind` names; none: 1 for every token. At level: sequence every token
    of an answer holds the geometric mean of its w, comparable across lengths."""
    if correction.kind == "tis":
        return truncated(w, correction.cap)
    if correction.kind == "mask":
        return masked(w, correction.low, correction.high)
    return torch.ones_like(w), torch.zeros_like(w, dtype=torch.bool)
