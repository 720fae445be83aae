"""Log-probabilities of given tokens without ever holding [tokens x vocabulary].

Invariant: beside hidden states, weight and their gradients, at most two buffers of
[chunk_tokens x vocabulary] in float32 exist at once, forward and backward. Logits are recomputed in
backward from the saved normaliser, one product more than a loss that keeps them all; nothing of a
chunk outlives it. Logits are products in the autocast dtype where autocast is on; from there on
everything is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    logit_multiplier: float,
    temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """(logprobs [N] with gradient, entropy [N] without), both float32, of the distribution
    softmax(hidden @ weight.T * multiplier / temperature): `hidden[i]` [H] predicts `targets[i]`.

    With N = 0 both inputs still get a gradient, of zeros, so that an empty micro-batch runs every
    backward hook.
    """
    scale = logit_multiplier / temperature
    return _TokenLogprobs.apply(hidden, targets, weight, scale, chunk_tokens)  # pyright: ignore[reportReturnType]


class _TokenLogprobs(torch.autograd.Function):
    """Saves the inputs and one float a token; ZeRO-3 gathers `weight` again before backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, scale: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        ctx.scale, ctx.chunk_tokens = scale, chunk_tokens
        ctx.dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            ctx.dtype = torch.get_autocast_dtype(device)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(targets), dtype=precise)
        normaliser, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        with torch.autocast(device, enabled=False):
            head = weight.to(ctx.dtype)
            for rows in _chunks(len(targets), chunk_tokens):
                logits = (hidden[rows].to(ctx.dtype) @ head.T).to(precise).mul_(scale)
                chosen = logits.gather(1, targets[rows, None]).squeeze(1)
                highest = logits.amax(1, keepdim=True)
                powers = logits.sub_(highest).exp()
                total = powers.sum(1)
                normaliser[rows] = total.log() + highest.squeeze(1)
                logprobs[rows] = chosen - normaliser[rows]
                # Row by row a product of two vectors: p * logits is never a third buffer.
                expected = torch.bmm(powers[:, None], logits[..., None]).flatten()
                entropy[rows] = total.log() - expected / total
                del logits, powers
        ctx.save_for_backward(hidden, targets, weight, normaliser)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """d logprob / d logits = scale x (one-hot of the target - softmax)."""
        hidden, targets, weight, normaliser = ctx.saved_tensors
        on_hidden, on_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_hidden = torch.empty_like(hidden) if on_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if on_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(ctx.dtype)
            for rows in _chunks(len(targets), ctx.chunk_tokens):
                states = hidden[rows].to(ctx.dtype)
                slopes = (states @ head.T).to(normaliser.dtype).mul_(ctx.scale)
                slopes.sub_(normaliser[rows, None]).exp_()
                push = upstream[rows, None].to(slopes.dtype) * ctx.scale
                slopes.mul_(-push).scatter_add_(1, targets[rows, None], push)
                slopes = slopes.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (slopes @ head).to(grad_hidden.dtype)
                if grad_weight is not None:
                    _add_products(grad_weight, slopes, states)
                del slopes
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, None, grad_weight, None, None


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _add_products(total: Tensor, slopes: Tensor, states: Tensor) -> None:
    """total [V, H] += slopes.T @ states, without a second [V, H] where the dtypes differ."""
    if total.dtype == slopes.dtype:
        total.addmm_(slopes.T, states)
        return
    words = max(1, slopes.numel() // states.shape[1])  # a piece no larger than the chunk of logits
    for part in _chunks(len(total), words):
        total[part] += slopes[:, part].T @ states
