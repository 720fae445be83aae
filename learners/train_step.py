"""Forward and backward over one rank's share of a plan.

Invariant: the loss of each micro-batch is its share of the global objective times the number of
ranks, because the engine averages gradients over ranks; the gradient that results is that of the
whole batch on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.build_batch import TrainPlan, advantages_by_group, build_micro_batch
from h1r_rl.grpo.policy_loss import LossInputs, policy_loss, reduce_metrics, sft_loss
from h1r_rl.records import Completion, MicroBatch

Reference = Callable[[Tensor, Tensor, Tensor], Tensor]  # learners.frozen_reference


def run_plan(
    engine: Any,
    plan: TrainPlan,
    completions: Mapping[tuple[int, int], Completion],
    *,
    algorithm: AlgorithmConfig | None,
    reference: Reference | None,
    max_response_tokens: int,
) -> dict[str, float]:
    """Accumulate gradients for the plan; returns means over all ranks."""
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), engine.device
    advantages = advantages_by_group(plan, algorithm) if algorithm else None
    totals: dict[str, Tensor] = {}
    for documents in plan.ranks[rank]:
        batch = build_micro_batch(plan, documents, completions, advantages)
        if algorithm is None:
            ids, starts, positions = batch_tensors(batch, device)
            logprobs, _ = engine(ids, starts, positions)
            loss, sums = sft_loss(logprobs, plan.num_target_tokens)
        else:
            inputs = _loss_inputs(engine, batch, algorithm, reference, device, plan.learner_version)
            loss, sums = policy_loss(
                inputs, algorithm, plan, max_response_tokens=max_response_tokens
            )
            logprobs = inputs.logprobs
        engine.backward((loss + _poison(loss) * logprobs.sum()) * ranks)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.detach().double()
    stacked = torch.stack(list(totals.values()))
    dist.all_reduce(stacked)
    return reduce_metrics(dict(zip(totals, stacked.tolist(), strict=True)))


def _poison(loss: Tensor) -> Tensor:
    """0, or NaN where the loss is not finite: a clamp gives NaN inputs a gradient of zero, so a
    broken loss could else leave finite gradients and the step would be taken."""
    return torch.where(torch.isfinite(loss.detach()), 0.0, torch.nan)


def batch_tensors(batch: MicroBatch, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids [T] int64, document_starts [D + 1] int64, positions of targets [N] int64)."""
    ids = torch.from_numpy(batch.input_ids.astype(np.int64)).to(device)
    starts = torch.from_numpy(batch.document_starts.astype(np.int64)).to(device)
    positions = torch.from_numpy(np.flatnonzero(batch.loss_mask)).to(device)
    return ids, starts, positions


def _loss_inputs(
    engine: Any,
    batch: MicroBatch,
    algorithm: AlgorithmConfig,
    reference: Reference | None,
    device: Any,
    learner_version: int,
) -> LossInputs:
    ids, starts, positions = batch_tensors(batch, device)

    def at_targets(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[batch.loss_mask]).to(device)

    logprobs, entropy = engine(ids, starts, positions)
    return LossInputs(
        logprobs=logprobs,
        behaviour=at_targets(batch.behaviour_logprobs),
        # One optimizer step a batch: the first forward of the step is this one.
        proximal=logprobs.detach() if algorithm.proximal == "recompute" else None,
        reference=reference(ids, starts, positions) if reference else None,
        advantages=at_targets(batch.advantages),
        document=torch.bucketize(positions, starts[1:], right=True),
        num_documents=len(starts) - 1,
        versions=at_targets(batch.versions),
        positive=at_targets(batch.positive),
        entropy=entropy,
        fresh=at_targets(_of_current_weights(batch, learner_version)),
    )


def _of_current_weights(batch: MicroBatch, version: int) -> np.ndarray:
    """[T] bool: no token of the document was sampled by other weights. With others in its past a
    token of this version was sampled from their KV and SSM state."""
    starts = batch.document_starts[:-1].astype(np.int64)
    own = (batch.versions == version) | (batch.versions < 0)  # -1: prompt
    lengths = np.diff(batch.document_starts)
    return np.repeat(np.logical_and.reduceat(own, starts), lengths)
