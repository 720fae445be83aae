"""Document boundaries inside a transformers hybrid: attention everywhere, convolution and scan on
the CPU.

Invariant: with `documents` among a model's forward arguments every operation that mixes tokens
stays inside a document. transformers hands unknown arguments through to these functions, and its
own CPU versions drop them without a word; so the three that mix tokens are replaced. Calls without
`documents` (generation with a cache, padded rows) keep transformers' meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from h1r_rl.errors import ConfigError
from h1r_rl.hybrid.cuda_kernels import kernel_problems, modeling_module
from h1r_rl.hybrid.model_folder import FAMILIES
from h1r_rl.hybrid.scan import chunked_scan
from h1r_rl.hybrid.varlen_attention import takes_varlen, varlen_attention

ATTENTION = "h1r_documents"


@dataclass(frozen=True)
class Documents:
    """Documents laid end to end in one row. Example: lengths (3, 2), starts [0, 3, 5]."""

    lengths: tuple[int, ...]
    starts: Tensor  # [D + 1] int64

    @property
    def index(self) -> Tensor:
        """[T] int64: which document a token belongs to."""
        sizes = self.starts[1:] - self.starts[:-1]
        return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)

    @property
    def positions(self) -> Tensor:
        """[T] int64: a token's place in its document."""
        total = sum(self.lengths)
        return torch.arange(total, device=self.starts.device) - self.starts[self.index]


def install_boundaries(model: Any) -> None:
    """Make a supported model honour `documents`; others are left alone (and never packed)."""
    if model.config.model_type not in FAMILIES:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, document_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    module = _modeling_module(model)
    if not hasattr(module, "h1r_originals"):
        module.h1r_originals = (module.causal_conv1d_fn, module.mamba2_chunk_scan)
        module.causal_conv1d_fn = _convolution_on(module.causal_conv1d_fn)
        module.mamba2_chunk_scan = _scan_on(module.mamba2_chunk_scan)
        module.h1r_replacements = (module.causal_conv1d_fn, module.mamba2_chunk_scan)


def honours_boundaries(model: Any) -> bool:
    """Whether documents may share a row: nothing that mixes tokens would cross a boundary."""
    if model.config.model_type not in FAMILIES:
        return False
    if next(model.parameters()).is_cuda and kernel_problems(model.config.model_type):
        return False
    module = _modeling_module(model)
    called = (module.causal_conv1d_fn, module.mamba2_chunk_scan)
    installed = getattr(module, "h1r_replacements", None) == called
    return installed and model.config._attn_implementation == ATTENTION


def _modeling_module(model: Any) -> Any:
    return modeling_module(model.config.model_type)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Documents | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document: [1, T, heads, head_dim] from [1, heads, T, head_dim].

    A varlen kernel where there is one (`takes_varlen`). Else documents of like length share a call,
    padded on the right, where a causal mask makes padding harmless: one call a document would cost
    more than the attention itself when they are short. That is exact on every device: no query sees
    a key of another document or one of the padding, which is at most a quarter plus 16 tokens.
    """
    if documents is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, heads, dim]
    if takes_varlen(query):
        return varlen_attention(query, key, value, documents, scaling)[None], None
    slots, shapes = padded_slots(documents.lengths)
    slots, sizes = slots.to(query.device), [rows * longest for rows, longest in shapes]

    def lay_out(tokens: Tensor) -> tuple[Tensor, ...]:
        empty = tokens.new_zeros(sum(sizes), *tokens.shape[1:])
        return empty.index_copy(0, slots, tokens).split(sizes)

    pieces = []
    for shape, *laid in zip(shapes, *map(lay_out, (query, key, value)), strict=True):
        attended = functional.scaled_dot_product_attention(
            *(t.unflatten(0, shape).transpose(1, 2) for t in laid),  # pyright: ignore[reportArgumentType]
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        pieces.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces).index_select(0, slots)[None], None


@lru_cache(maxsize=16)
def padded_slots(lengths: tuple[int, ...]) -> tuple[Tensor, list[tuple[int, int]]]:
    """([T] slot of each token in padded batches laid one after the other, (rows, longest) of each
    batch). Example: lengths (2, 3) share a batch: slots [0, 1, 3, 4, 5], shapes [(2, 3)]."""
    first = np.empty(len(lengths), dtype=np.int64)  # slot of each document's first token
    shapes, offset = [], 0
    for batch in _alike(lengths):
        longest = max(lengths[document] for document in batch)
        first[batch] = offset + longest * np.arange(len(batch))
        shapes.append((len(batch), longest))
        offset += longest * len(batch)
    sizes = np.asarray(lengths)
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return torch.from_numpy(np.repeat(first, sizes) + position), shapes


def _alike(lengths: tuple[int, ...]) -> list[list[int]]:
    """Document indices in buckets whose lengths differ by little."""
    buckets: list[list[int]] = []
    shortest = 0
    for document in sorted(range(len(lengths)), key=lambda d: (lengths[d], d)):
        if not buckets or lengths[document] > 1.25 * shortest + 16:
            buckets.append([])
            shortest = lengths[document]
        buckets[-1].append(document)
    return buckets


def _convolution_on(original: Any) -> Any:
    def convolve(x, weight, bias=None, activation=None, documents=None, **kwargs):
        """[1, channels, T]: causal, with zeros before every document's first token."""
        if documents is None or x.is_cuda:
            return original(x, weight, bias, activation=activation, **kwargs)
        rows = x[0].transpose(0, 1).to(weight.dtype)
        gap = weight.shape[-1] - 1
        places = torch.arange(len(rows), device=x.device) + gap * (documents.index + 1)
        spaced = rows.new_zeros(len(rows) + gap * len(documents.lengths), rows.shape[1])
        spaced = spaced.index_copy(0, places, rows)
        taps = weight.transpose(0, 1)  # [width, channels]
        length = len(spaced) - gap
        out = sum(spaced[i : i + length] * taps[i] for i in range(gap + 1))
        out = out.index_select(0, places - gap)  # pyright: ignore[reportAttributeAccessIssue]
        if bias is not None:
            out = out + bias
        if activation is not None:
            out = getattr(functional, activation)(out)
        return out.to(x.dtype).transpose(0, 1)[None]

    return convolve


def _scan_on(original: Any) -> Any:
    def scan(
        x, dt, A, B, C, chunk_size, D: Any = None, dt_bias: Any = None, documents=None, **kwargs
    ):
        """transformers' signature. Its chunk size is a kernel's, not a property of the model."""
        continues = kwargs.get("return_final_states") or kwargs.get("initial_states") is not None
        if continues and documents is not None:
            raise ConfigError(
                "packed documents start from empty states, but the model was asked to keep or "
                "continue one; call it with use_cache=False"
            )
        if x.is_cuda or continues:
            return original(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, **kwargs)
        batch, length = x.shape[:2]
        lengths = documents.lengths if documents is not None else (length,) * batch
        low, high = kwargs.get("dt_limit", (0.0, float("inf")))
        precise = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # the state decays: never in bf16
            dt = functional.softplus(dt.to(precise) + dt_bias.to(precise)).clamp(low, high)
            rows, dt, B, C = (t.to(precise).flatten(0, 1) for t in (x, dt, B, C))
            y = chunked_scan(rows, dt, A.to(precise), B, C, D.to(precise), lengths)
        return y.to(x.dtype).unflatten(0, (batch, length))

    return scan
