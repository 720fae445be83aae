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

    First-fit-decreasing into `budget` tokens (a longer document has a bin of its own) says how many
    bins are needed; that many, rounded up to the same number a rank, are filled evenly by cost
    where the documents fit so too. They go to the ranks costliest first, each to the rank with
    least work.
    """
    costs = [document_cost(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _first_fit(order, lengths, budget)
    even = _evenly(order, lengths, costs, -(-len(bins) // ranks) * ranks, budget)
    bins = [members for members in even or bins if members]

    work = [0.0] * ranks
    placed: list[list[list[int]]] = [[] for _ in range(ranks)]
    total = [sum(costs[i] for i in members) for members in bins]
    for b in sorted(range(len(bins)), key=lambda b: (-total[b], bins[b])):
        rank = min(range(ranks), key=lambda r: (work[r], r))
        placed[rank].append(sorted(bins[b]))
        work[rank] += total[b]
    count = max(len(micro_batches) for micro_batches in placed)
    return [micro_batches + [[]] * (count - len(micro_batches)) for micro_batches in placed]


def _first_fit(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
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
    return bins


def _evenly(
    order: list[int], lengths: Sequence[int], costs: list[float], count: int, budget: int
) -> list[list[int]] | None:
    """Each document into the bin with least work that has room; None where one finds none."""
    bins: list[list[int]] = [[] for _ in range(count)]
    work, room = [0.0] * count, [budget] * count
    for document in order:
        fitting = [b for b in range(count) if lengths[document] <= room[b] or not bins[b]]
        if not fitting:
            return None
        b = min(fitting, key=lambda b: (work[b], b))
        bins[b].append(document)
        work[b] += costs[document]
        room[b] -= lengths[document]
    return bins


def document_cost(length: int) -> float:
    """Work of one document, in tokens of a short one."""
    return length * (1 + length / ATTENTION_PARITY_TOKENS)
