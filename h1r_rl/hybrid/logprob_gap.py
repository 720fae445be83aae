"""How far two computations of the same log-probabilities are apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Gap:
    """Over tokens sampled from mu: mean and largest |log pi - log mu|, and KL(mu || pi) by the
    estimator E[r - 1 - log r], r = pi / mu, which is never negative.
    Example: Gap(2e-7, 5e-6, 1e-13).
    """

    mean: float
    max: float
    kl: float


def gap(learner: ArrayLike, engine: ArrayLike) -> Gap:
    """Of log-probabilities [N] of the same tokens, N >= 1; NaN wherever either holds one."""
    difference = np.asarray(learner, np.float64) - np.asarray(engine, np.float64)
    distance = np.abs(difference)
    kl = np.mean(np.expm1(difference) - difference)
    return Gap(float(distance.mean()), float(distance.max()), float(kl))
