"""Documents into micro-batches under a token budget, balanced over ranks.

Invariant: every document is placed exactly once, every rank gets the same number of micro-batches
(empty ones pad), and the result depends on the lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence

# Length at which a token's attention costs as much as everything else it goes through: attention
# grows with the square of the length, Mamba and the MLPs do not (7B: about 100k tokens).
ATTENTION_PARITY_TOKENS = 100_000


def pack_documents(lengths: Sequence[int], *, ranks: int, budget: int) -> list[list[list[int]]]:
    """`result[rank][micro_batch]` = document indices in ascending order.

    First-fit-decreasing into bins of `budget` tokens (a longer document has a bin of its own),
    then bins to ranks, costliest first, each to the rank with least work.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for document in order:
        for b, free in enumerate(room):
            if lengths[document] <= free:
                bins[b].append(document)
                room[b] -= lengths[document]
                break
        else:
            bins.append([document])
            room.append(budget - lengths[document])

    costs = [sum(document_cost(lengths[i]) for i in members) for members in bins]
    work = [0.0] * ranks
    placed: list[list[list[int]]] = [[] for _ in range(ranks)]
    for b in sorted(range(len(bins)), key=lambda b: (-costs[b], bins[b])):
        rank = min(range(ranks), key=lambda r: (work[r], r))
        placed[rank].append(sorted(bins[b]))
        work[rank] += costs[b]
    count = max(len(micro_batches) for micro_batches in placed)
    return [micro_batches + [[]] * (count - len(micro_batches)) for micro_batches in placed]


def document_cost(length: int) -> float:
    """Work of one document, in tokens of a short one."""
    return length * (1 + length / ATTENTION_PARITY_TOKENS)
