"""The policy that a KL term holds the trained one near.

Invariant: it computes as the trained policy does (the engine's rounding, autocast, and the kernels
of training mode), so that equal weights have a KL of 0 and not the distance of two arithmetics.
Beneath adapters it is there already: then no second model is held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from h1r_rl.config.schema import LearnerConfig
from h1r_rl.hybrid.engine_values import compute_as_engine
from h1r_rl.hybrid.lora import adapters_off
from learners.deepspeed_engine import PolicyLogprobs


class FrozenReference:
    def __init__(
        self, policy: PolicyLogprobs, learner: LearnerConfig, *, beneath_adapters: bool = False
    ) -> None:
        """Takes `policy` over: it is changed to compute with what engines hold. `beneath_adapters`:
        it is the trained one, which does so already, and is left as it is."""
        self._policy = policy
        self._autocast = learner.autocast == "bfloat16"
        if beneath_adapters:
            return
        policy.train().requires_grad_(False)
        compute_as_engine(
            policy.model, policy.engine_dtype, autocast=learner.autocast == policy.engine_dtype
        )

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, document_starts: Tensor, positions: Tensor) -> Tensor:
        """logprobs [N], as PolicyLogprobs.forward gives them."""
        bf16 = torch.autocast(input_ids.device.type, torch.bfloat16, self._autocast)
        with bf16, adapters_off(self._policy.model):
            logprobs, _ = self._policy(input_ids, document_starts, positions)
        return logprobs
