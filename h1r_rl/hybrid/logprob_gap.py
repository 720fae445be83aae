"""How far two computations of the same log-probabilities are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

Values = TypeVar("Values")  # a numpy array or a torch tensor, alike


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


def slip_terms(difference: Values, learner: Values, entropy: Values) -> tuple[Values, ...]:
    """[N] terms each, whose sums over tokens `temperature_slip` takes: of log pi - log mu, log pi
    and the entropy of pi where each token was sampled.

    A temperature T' where T was meant is a slope: d log pi / d log(1/T) = log pi + entropy, so to
    first order log pi - log mu = (1 - T'/T) (log pi + entropy), T' the learner's. Rounding has no
    such slope, whatever its size.
    """
    score = learner + entropy  # pyright: ignore[reportOperatorIssue]
    product = difference * score
    return product, score * score, product * product


def temperature_slip(
    products: float, squares: float, squared_products: float
) -> tuple[float, float]:
    """(1 - the learner's temperature / the engine's, its standard error) by least squares through
    the origin, the error for differences whose size may vary from token to token. `squares` > 0:
    no temperature changes what is certain."""
    return products / squares, math.sqrt(squared_products) / squares
