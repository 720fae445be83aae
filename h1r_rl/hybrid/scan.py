"""Mamba-2's chunked scan over documents laid end to end, in matrix products.

Invariant: for every document y_t = C_t h_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t
and h = 0 before its first token, for every chunk size (state-space duality, 2405.21060 section 6).
A chunk never holds tokens of two documents, so no document's contents enter another's arithmetic,
not even its rounding. The longest one's length may: it sets the chunk and so the order of sums.
Time and memory are linear in the number of tokens.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CHUNK = 64  # tokens: balances the quadratic inside against the states between chunks


def chunked_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """[T, heads, head_dim] from x of that shape, dt [T, heads] (positive), A [heads] (negative),
    B and C [T, groups, state], D [heads]; `lengths` of the documents add up to T."""
    chunk = min(CHUNK, max(lengths))
    slots, counts = chunk_slots(lengths, chunk)
    slots = slots.to(x.device)

    def lay_out(rows: Tensor) -> Tensor:
        """[T, ...] -> [chunks, chunk, ...]; the zeros that fill up decay nothing, add nothing."""
        empty = rows.new_zeros(sum(counts) * chunk, *rows.shape[1:])
        return empty.index_copy(0, slots, rows).unflatten(0, (-1, chunk))

    added, total = lay_out(x * dt[..., None]), lay_out(dt * A).cumsum(1)
    keys, queries = lay_out(B), lay_out(C)
    y = _within_chunks(added, total, keys, queries)
    if len(counts) > 1:
        first = counts[0]  # chunks that open a document read no state
        states = _states_before(added, total, keys, counts)
        read = torch.einsum("cqgn,cgnm->cqgm", queries[first:], states).flatten(2)
        read = read.unflatten(2, x.shape[1:]) * total[first:].exp()[..., None]
        y = torch.cat([y[:first], y[first:] + read])
    return y.flatten(0, 1).index_select(0, slots) + D[:, None] * x


def _within_chunks(added: Tensor, total: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """An attention whose weights are C_q . B_k times the decay from k to q."""
    chunk, groups = keys.shape[1], keys.shape[2]
    scores = torch.einsum("cqgn,ckgn->cgqk", queries, keys)
    total = total.transpose(1, 2)  # [c, h, q]
    # A token's decay to itself is 1 whatever the rates are. As a difference it would send its
    # weight, the largest of all where decay is strong, to `total` twice, to cancel but for its
    # rounding: 8e-5 of A_log's gradient, where 7e-6 are left this way.
    earlier = torch.ones(chunk, chunk, dtype=total.dtype, device=total.device).tril(-1)
    later = torch.full_like(earlier, -torch.inf).triu(1)
    decay = torch.addcmul(later, total[..., :, None] - total[..., None, :], earlier).exp()
    weights = scores[:, :, None] * decay.unflatten(1, (groups, -1))
    return (weights.flatten(1, 2) @ added.transpose(1, 2)).transpose(1, 2)


def _states_before(added: Tensor, total: Tensor, keys: Tensor, counts: tuple[int, ...]) -> Tensor:
    """[chunks - counts[0], groups, state, heads a group x head_dim]: what each chunk that does not
    open its document starts from."""
    groups, head_dim = keys.shape[2], added.shape[3]
    offsets = np.cumsum((0, *counts))
    # Chunk i of this list hands its state to chunk counts[0] + i: both are in step order.
    feeders = np.concatenate([np.arange(n) + o for n, o in zip(counts[1:], offsets, strict=False)])
    feeders = torch.from_numpy(feeders).to(keys.device)
    added, total, keys = (t.index_select(0, feeders) for t in (added, total, keys))
    to_end = (total[:, -1:] - total).exp()[..., None]
    grouped = (added * to_end).flatten(2).unflatten(2, (groups, -1))
    contributions = torch.einsum("ckgn,ckgm->cgnm", keys, grouped).split(counts[1:])
    whole = total[:, -1].exp().repeat_interleave(head_dim, -1)
    decays = whole.unflatten(1, (groups, 1, -1)).split(counts[1:])
    state = contributions[0]
    states = [state]
    for decay, contribution in zip(decays[1:], contributions[1:], strict=True):
        state = decay * state[: len(decay)] + contribution
        states.append(state)
    return torch.cat(states)


@lru_cache(maxsize=16)
def chunk_slots(lengths: tuple[int, ...], chunk: int) -> tuple[Tensor, tuple[int, ...]]:
    """(slot of each token in [chunks x chunk], how many documents reach chunk 0, 1, 2, ...).

    Chunks stand in step order: first every document's first chunk, longest document first, then
    the second chunks, and so on. So the documents advance side by side, each step on a prefix.
    """
    sizes = np.asarray(lengths)
    num_chunks = -(-sizes // chunk)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.argsort(-num_chunks, kind="stable")] = np.arange(len(sizes))
    counts = (num_chunks[:, None] > np.arange(num_chunks.max())).sum(0)
    offsets = np.cumsum(counts) - counts
    document = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slots = (offsets[position // chunk] + rank[document]) * chunk + position % chunk
    return torch.from_numpy(slots), tuple(counts.tolist())
