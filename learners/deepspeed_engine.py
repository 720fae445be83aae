"""A DeepSpeed engine around the policy.

Invariant: parameters stay float32 (bf16 is torch autocast over them, never `bf16.enabled`, which
would cast A_log, dt_bias and D); gradients are accumulated as they come (`managed_gradient_
accumulation: false`), so the number of micro-batches may differ from step to step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from h1r_rl.config.schema import LearnerConfig, OptimizerConfig
from h1r_rl.hybrid.engine_values import compute_as_engine, rounded
from h1r_rl.hybrid.load import output_head
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.token_logprobs import token_logprobs

# State-space parameters are rates and gains, not weights of a map: decay would pull them off.
NO_DECAY = ("A_log", "dt_bias", ".D", "bias", "norm")


class PolicyLogprobs(nn.Module):
    """The whole forward pass as one module, so that ZeRO's hooks see every parameter's use.

    `engine_dtype`: dtype of the engine whose log-probabilities these are compared with; the values
    that it rounded to are those computed with, once `compute_as_engine` has been called too.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        chunk_tokens: int,
        engine_dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.engine_dtype = engine_dtype

    def forward(
        self,
        input_ids: Tensor,
        document_starts: Tensor,
        positions: Tensor,
        temperature: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logprobs [N], entropy [N]) of the tokens at `positions` [N], none of which starts a
        document; input_ids [T] int64. `temperature`: another one than the policy's."""
        hidden = hidden_states(self.model, input_ids, document_starts)
        weight, multiplier = output_head(self.model)
        return token_logprobs(
            hidden[positions - 1],
            input_ids[positions],
            rounded(weight, getattr(torch, self.engine_dtype)),
            logit_multiplier=multiplier,
            temperature=temperature or self.temperature,
            chunk_tokens=self.chunk_tokens,
        )


def deepspeed_config(learner: LearnerConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """DeepSpeed's JSON for one of our configurations. The learning rate is set step by step."""
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.gradient_clip,
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": 1e-8,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 10**9,
    }
    if learner.autocast == "bfloat16":
        # No module may travel rounded: by default DeepSpeed marks linear and convolution weights
        # so that ranks gather them and reduce their gradients in bfloat16.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        }
    return config


def build_engine(policy: PolicyLogprobs, learner: LearnerConfig, optimizer: OptimizerConfig) -> Any:
    """Wrap the policy; torch.distributed must be initialised."""
    import deepspeed

    if learner.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=_parameter_groups(policy, optimizer.weight_decay),
        config=deepspeed_config(learner, optimizer),
    )
    compute_as_engine(
        policy.model, policy.engine_dtype, autocast=learner.autocast == policy.engine_dtype
    )
    if learner.zero_stage == 3:
        deepspeed.zero.register_external_parameter(policy, output_head(policy.model)[0])
    if learner.zero_stage == 0:
        _keep_clipped_norm(engine, optimizer.gradient_clip)
    return engine


def _keep_clipped_norm(engine: Any, limit: float) -> None:
    """Without ZeRO, DeepSpeed clips float32 gradients and forgets the norm; keep it for the log."""

    def clip() -> None:
        engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), limit)

    engine.clip_fp32_gradients = clip


def _parameter_groups(policy: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if not name.endswith(NO_DECAY) and p.ndim > 1]
    exempt = [p for name, p in named if name.endswith(NO_DECAY) or p.ndim <= 1]
    groups = [
        {"params": plain, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are all of one kind


def apply_gradients(engine: Any) -> tuple[float, bool]:
    """(gradient norm, whether the step was skipped on every rank because it was not finite).

    ZeRO 1-3 check the reduced norm themselves. Without ZeRO nothing does: ranks agree here first,
    since a NaN on one rank would become everybody's in the reduction.
    """
    if engine.zero_optimization_stage() == 0 and not _all_ranks_finite(engine):
        engine.zero_grad()
        for parameter in engine.module.parameters():
            parameter.grad = None
        return math.nan, True
    before = engine.skipped_steps
    engine.step()
    if engine.skipped_steps > before:
        return math.nan, True
    return float(engine.get_global_grad_norm()), False


def _all_ranks_finite(engine: Any) -> bool:
    import torch.distributed as dist

    norms = [p.grad.norm() for p in engine.module.parameters() if p.grad is not None]
    finite = not norms or bool(torch.isfinite(torch.stack(norms)).all())
    broken = torch.tensor(0.0 if finite else 1.0, device=engine.device)
    dist.all_reduce(broken)
    return not broken.item()
