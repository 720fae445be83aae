"""Gap and KL against their definitions; multipliers taken out and put back."""

import numpy as np
import pytest

from h1r_rl.grpo.tripwires import GAP_FLOOR, STOP_FACTOR
from h1r_rl.hybrid.logprob_gap import gap, slip_terms, temperature_slip


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


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("ratio", [0.95, 0.98, 1.0, 1.05])
def test_a_wrong_temperature_is_a_slope_and_rounding_is_none(ratio):
    """4,000 tokens, noise of 0.02 in every logit as beside a bfloat16 engine: the distance alone
    would pass."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((4000, 50))
    mu = log_softmax(logits + 0.02 * rng.standard_normal(logits.shape))
    pi = log_softmax(logits / ratio)
    tokens = np.array([rng.choice(50, p=np.exp(row)) for row in mu])[:, None]
    ours, theirs = (np.take_along_axis(values, tokens, 1)[:, 0] for values in (pi, mu))
    entropy = -(np.exp(pi) * pi).sum(-1)
    terms = slip_terms(ours - theirs, ours, entropy)
    slip, error = temperature_slip(*(float(values.sum()) for values in terms))
    assert error < 3e-3
    assert slip == pytest.approx(1 - ratio, abs=4 * error + 0.1 * abs(1 - ratio))
    assert gap(ours, theirs).mean < STOP_FACTOR * GAP_FLOOR["bfloat16", "float32"]
