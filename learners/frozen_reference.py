"""The policy that a KL term holds the trained one near.

Invariant: it computes as the trained policy does (the engine's rounding, autocast, and the kernels
of training mode), so that equal weights have a KL of 0 and not the distance of two arithmetics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from h1r_rl.config.schema import LearnerConfig
from h1r_rl.hybrid.engine_values import compute_as_engine
from learners.deepspeed_engine import PolicyLogprobs


class FrozenReference:
    def __init__(self, policy: PolicyLogprobs, learner: LearnerConfig) -> None:
        """Takes `policy` over: it is changed to compute with what engines hold."""
        self._policy = policy.train().requires_grad_(False)
        self._autocast = learner.autocast == "bfloat16"
        compute_as_engine(
            policy.model, policy.engine_dtype, autocast=learner.autocast == policy.engine_dtype
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, document_starts: Tensor, positions: Tensor) -> Tensor:
        """logprobs [N], as PolicyLogprobs.forward gives them."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, self._autocast):
            logprobs, _ = self._policy(input_ids, document_starts, positions)
        return logprobs
