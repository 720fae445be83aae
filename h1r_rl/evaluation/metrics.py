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


def problem_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[problems with a value]: means over each problem's samples, NaN (no verdict) left out."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    sums = np.where(known, values, 0.0).sum(axis=1)
    return sums[counts > 0] / counts[counts > 0]


def clustered_se(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of [problems, samples], clustered by problem."""
    means = problem_means(values)
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
    """All arguments [problems, samples]; correct, formatted, truncated are 0 or 1, the first two
    NaN where no verdict could be had; surprise is the mean -logprob of a sample's tokens, whose
    mean estimates the entropy a token."""
    judged = ~np.isnan(correct)
    summary = {
        "pass@1": float(problem_means(correct).mean()) if judged.any() else 0.0,
        "se": clustered_se(correct),
        "mean_length": float(lengths.mean()),
        "format_rate": float(np.nanmean(formatted)) if judged.any() else 0.0,
        "without_verdict": float(1 - judged.mean()),
        "truncated": float(truncated.mean()),
        "entropy": float((surprise * lengths).sum() / max(lengths.sum(), 1)),
    }
    if pass_at is not None:
        counts = zip(np.nansum(correct, axis=1), judged.sum(axis=1), strict=True)
        enough = [pass_at_k(int(c), int(n), pass_at) for c, n in counts if n >= pass_at]
        summary[f"pass@{pass_at}"] = float(np.mean(enough)) if enough else 0.0
    return summary


def paired_difference(
    before: NDArray[np.float64], after: NDArray[np.float64]
) -> tuple[float, float, float]:
    """(difference, low, high): after - before on the same problems, 95% interval.

    Both [problems, samples]; sample counts may differ.
    """
    difference = np.nanmean(after, axis=1) - np.nanmean(before, axis=1)
    centre = float(difference.mean())
    margin = Z95 * clustered_se(difference[:, None])
    return centre, centre - margin, centre + margin
