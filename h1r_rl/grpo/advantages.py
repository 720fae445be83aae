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


def grpo_advantages(scores: Floats, std: float | None = None) -> Floats:
    """(r - mean) / (std + eps) over one group, eps 1e-6 (DeepSeekMath, 2402.03300; the default).
    Population std of the group, or `std` where one is given for the whole batch."""
    return (scores - scores.mean()) / ((float(scores.std()) if std is None else std) + EPSILON)


def dr_grpo_advantages(scores: Floats) -> Floats:
    """r - mean: no std, which weighs easy and hard prompts up (Dr. GRPO, 2503.20783)."""
    return scores - scores.mean()


def rloo_advantages(scores: Floats) -> Floats:
    """r - mean of the others: leave-one-out, an unbiased baseline (RLOO, 2402.14740). Needs two."""
    return (scores - scores.mean()) * len(scores) / (len(scores) - 1)


def group_advantages(
    scores: Floats,
    kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo",
    *,
    std: float | None = None,
) -> Floats:
    """[G] float64 from [G] scores (NaN: no verdict, advantage 0), by the function that `kind`
    names; `std` (grpo only) divides instead of the group's own."""
    judged = ~np.isnan(scores)
    result = np.zeros(len(scores), dtype=np.float64)
    if judged.sum() < 2:
        return result
    found = scores[judged]
    if kind == "grpo":
        result[judged] = grpo_advantages(found, std)
    else:
        result[judged] = (dr_grpo_advantages if kind == "dr_grpo" else rloo_advantages)(found)
    return result


def batch_std(groups: list[Floats]) -> float:
    """Population std of the group-centred scores over the whole batch, for advantage_std: batch
    (REINFORCE++, 2501.03262, normalises over the batch). The default is per group. Groups of one
    score have no advantage and no part in it."""
    judged = [scores[~np.isnan(scores)] for scores in groups]
    centred = [scores - scores.mean() for scores in judged if len(scores) > 1]
    return float(np.concatenate(centred).std()) if centred else 0.0
