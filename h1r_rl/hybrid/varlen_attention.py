"""Attention over documents laid end to end by a varlen kernel: cumulative lengths, no padding.

torch's own (`torch.nn.attention.varlen`, flash attention underneath), so that a GPU needs no
package more. It computes in 16 bits only: float32 on CUDA keeps the padded calls of `boundaries`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from h1r_rl.hybrid.boundaries import Documents

MAX_HEAD_DIM = 256  # flash attention's; and its loads want heads in eights
OLDEST_GPU = (8, 0)  # Ampere


def takes_varlen(query: Tensor) -> bool:
    """Whether the kernel computes with what is in hand: device, dtype, head size."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= MAX_HEAD_DIM
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= OLDEST_GPU
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None
) -> Tensor:
    """Causal attention inside each document: [T, heads, head_dim] of query's dtype.

    `query` [T, heads, head_dim], `key` and `value` [T, kv_heads, head_dim].
    """
    from torch.nn.attention import varlen

    boundaries = documents.starts.to(torch.int32)  # cu_seqlens: [D + 1], from 0 to T
    longest = max(documents.lengths)
    return varlen.varlen_attn(
        query,
        key,
        value,
        boundaries,
        boundaries,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )  # pyright: ignore[reportReturnType] - a pair only where auxiliary outputs are asked for
