"""Gap and KL against their definitions; multipliers taken out and put back."""

import numpy as np
import pytest

from h1r_rl.hybrid.logprob_gap import gap


def test_gap_of_sampled_tokens_estimates_the_divergence():
    """Tokens drawn from mu: the estimate approaches sum mu log(mu / pi), computed in full."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(8)
    mu = np.exp(logits - np.logaddexp.reduce(logits))
    moved = logits + 0.3 * rng.standard_normal(8)
    pi = np.exp(moved - np.logaddexp.reduce(moved))
    tokens = rng.choice(8, 200_000, p=mu)
    found = gap(np.log(pi)[tokens], np.log(mu)[tokens])
    assert found.kl == pytest.approx(float((mu * np.log(mu / pi)).sum()), rel=0.03)
    distances = np.abs(np.log(pi / mu))
    assert found.max == pytest.approx(distances.max())
    assert found.mean == pytest.approx(float((mu * distances).sum()), rel=0.03)


def test_equal_is_zero_and_nan_shows():
    values = np.float32([-1.5, -0.25])
    assert gap(values, values) == gap(values, values.copy())
    assert gap(values, values).mean == gap(values, values).max == gap(values, values).kl == 0
    assert np.isnan(gap(values, np.float32([np.nan, -1])).mean)
