"""Policy losses: what one token contributes, to be minimised, and where the clip cut its gradient.

Every function maps float tensors of N tokens to ([N] loss, [N] bool). `ratio` is rho_t =
pi_theta / pi_prox with gradient, `advantages` A_t; nothing here sums or weighs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from h1r_rl.config.schema import AlgorithmConfig


def clip_loss(
    ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.28
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A): PPO (1707.06347, low = high = 0.2), with bounds
    of their own as in DAPO (2503.14476: 0.2 and 0.28, the defaults)."""
    free, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(free, bounded), free > bounded


def dual_clip_loss(
    ratio: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.28, c: float = 3.0
) -> tuple[Tensor, Tensor]:
    """clip_loss, and for A < 0 no more than -c A: max(min(rho A, clip(rho) A), c A), so that a
    token that became likely though it was wrong does not dominate (1912.09729, c = 3)."""
    loss, clipped = clip_loss(ratio, advantages, low, high)
    floor = c * advantages
    cut = (advantages < 0) & (-loss < floor)
    return torch.where(cut, -floor, loss), clipped | cut


def cispo_loss(
    ratio: Tensor, advantages: Tensor, logprobs: Tensor, low: float = 1.0, high: float = 4.0
) -> tuple[Tensor, Tensor]:
    """-sg(clip(rho, 1 - low, 1 + high)) A log pi_theta: the weight is clipped, never the gradient
    (MiniMax-M1, 2506.13585; low = 1 leaves only the upper bound, 5 as in ScaleRL, 2510.13786)."""
    bounded = ratio.clamp(1 - low, 1 + high).detach()
    return -bounded * advantages * logprobs, ratio != bounded


def surrogate_loss(
    log_ratio: Tensor, advantages: Tensor, logprobs: Tensor, algorithm: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """The one that `algorithm.policy_loss` names. GSPO (2507.18071, 3e-4 and 4e-4) is clip_loss
    whose every token holds its answer's s = exp(mean_t log rho_t): `log_ratio` is that mean."""
    ratio, low, high = log_ratio.exp(), algorithm.clip_low, algorithm.clip_high
    if algorithm.policy_loss == "cispo":
        return cispo_loss(ratio, advantages, logprobs, low, high)
    if algorithm.policy_loss == "dual_clip":
        return dual_clip_loss(ratio, advantages, low, high, algorithm.dual_clip)
    return clip_loss(ratio, advantages, low, high)
