"""Log-probabilities of given tokens without ever holding [tokens x vocabulary].

Invariant: at most `chunk_tokens` rows of logits exist at once, forward and backward; the logits
are recomputed in backward. float32 throughout, whatever the hidden states' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    """
    if not len(targets):
        # Still tied to the graph, so that an empty micro-batch runs every backward hook.
        zero = hidden.sum().float() * 0 + weight.sum().float() * 0
        return zero.expand(0), hidden.new_zeros(0, dtype=torch.float32)
    scale = logit_multiplier / temperature
    parts = [
        checkpoint(_chunk, h, t, weight, scale, use_reentrant=False)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropy = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy).detach()


def _chunk(hidden: Tensor, targets: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight).float() * scale
    normaliser = torch.logsumexp(logits, dim=-1)
    chosen = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    with torch.no_grad():
        probabilities = (logits - normaliser[:, None]).exp()
        entropy = normaliser - (probabilities * logits).sum(-1)
    return chosen, entropy
