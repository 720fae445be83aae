"""Accuracy over problems and samples, with errors that respect what is random.

Invariant: problems are the independent units; several samples of one problem are a cluster.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased pass@k: 1 - C(n - c, k) / C(n, k) (2107.03374)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def clustered_se(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of [problems, samples], clustered by problem."""
    means = values.mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else 0.0


def summarise(
    correct: NDArray[np.float64],
    lengths: NDArray[np.float64],
    formatted: NDArray[np.float64],
    truncated: NDArray[np.float64],
    surprise: NDArray[np.float64],
    *,
    pass_at: int | None,
) -> dict[str, float]:
    """All arguments [problems, samples]; correct, formatted, truncated are 0 or 1; surprise is the
    mean -logprob of a sample's tokens, whose mean estimates the entropy a token."""
    summary = {
        "pass@1": float(correct.mean()),
        "se": clustered_se(correct),
        "mean_length": float(lengths.mean()),
        "format_rate": float(formatted.mean()),
        "truncated": float(truncated.mean()),
        "entropy": float((surprise * lengths).sum() / max(lengths.sum(), 1)),
    }
    if pass_at is not None:
        samples = correct.shape[1]
        summary[f"pass@{pass_at}"] = float(
            np.mean([pass_at_k(int(c), samples, pass_at) for c in correct.sum(axis=1)])
        )
    return summary


def paired_difference(
    before: NDArray[np.float64], after: NDArray[np.float64]
) -> tuple[float, float, float]:
    """(difference, low, high): after - before on the same problems, 95% interval.

    Both [problems, samples]; sample counts may differ.
    """
    difference = after.mean(axis=1) - before.mean(axis=1)
    centre = float(difference.mean())
    margin = Z95 * clustered_se(difference[:, None])
    return centre, centre - margin, centre + margin
