"""Advantages of a group from its scores.

Invariant: a sample without a verdict (NaN) takes no part: not in the mean, not in the std, and its
own advantage is 0. A wrong answer (0.0) does.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-6  # keeps groups of nearly equal scores finite

Floats = NDArray[np.float64]


def has_signal(scores: Floats) -> bool:
    """Whether the group's verdicts differ: without it every advantage is 0."""
    judged = scores[~np.isnan(scores)]
    return len(judged) >= 2 and bool(judged.max() > judged.min())


def group_advantages(
    scores: Floats,
    kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo",
    *,
    std: float | None = None,
) -> Floats:
    """[G] float64 from [G] scores (NaN: no verdict).

    grpo (2402.03300): (r - mean) / (std + eps), population std of the group, or `std` where one
    is given for the whole batch. dr_grpo (2503.20783): r - mean. rloo: r - mean of the others.
    """
    judged = ~np.isnan(scores)
    result = np.zeros(len(scores), dtype=np.float64)
    count = int(judged.sum())
    if count < 2:
        return result
    centred = scores[judged] - scores[judged].mean()
    if kind == "grpo":
        divisor = float(scores[judged].std()) if std is None else std
        centred = centred / (divisor + EPSILON)
    elif kind == "rloo":
        centred = centred * count / (count - 1)
    result[judged] = centred
    return result


def batch_std(groups: list[Floats]) -> float:
    """Std of the group-centred scores over the whole batch, for advantage_std: batch."""
    judged = [scores[~np.isnan(scores)] for scores in groups]
    centred = [scores - scores.mean() for scores in judged if len(scores)]
    return float(np.concatenate(centred).std()) if centred else 0.0
