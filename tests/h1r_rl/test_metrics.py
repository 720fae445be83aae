"""Estimators against enumeration and simulation."""

import itertools

import numpy as np
import pytest

from h1r_rl.evaluation.metrics import clustered_se, paired_difference, pass_at_k, summarise


@pytest.mark.parametrize("samples", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = [1] * correct + [0] * (samples - correct)
        subsets = list(itertools.combinations(outcomes, k))
        expected = sum(any(s) for s in subsets) / len(subsets)
        assert pass_at_k(correct, samples, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_is_exact():
    """Products of floats lose this; 512 choose 256 does not fit a float's integers either."""
    assert pass_at_k(1, 512, 256) == pytest.approx(0.5, abs=1e-12)
    assert pass_at_k(0, 512, 8) == 0 and pass_at_k(512, 512, 8) == 1


def test_standard_error_is_clustered_by_problem():
    """Two-level simulation: the estimate agrees with the spread over repetitions; the error of
    independent samples would be about half of it."""
    rng = np.random.default_rng(0)

    def draw():
        skill = rng.beta(0.5, 0.5, size=(200, 1))
        return (rng.random((200, 8)) < skill).astype(float)

    runs = [draw() for _ in range(400)]
    spread = np.std([run.mean() for run in runs])
    estimate = np.mean([clustered_se(run) for run in runs])
    independent = np.mean([run.std() / np.sqrt(run.size) for run in runs])
    assert estimate == pytest.approx(spread, rel=0.1)
    assert independent < 0.6 * spread


def test_duplicated_samples_add_no_certainty():
    values = np.random.default_rng(1).integers(0, 2, (50, 2)).astype(float)
    assert clustered_se(np.tile(values, (1, 10))) == pytest.approx(clustered_se(values))
    assert clustered_se(values[:1]) == 0.0


def test_paired_interval_covers_the_truth_and_is_narrower():
    """95% of intervals hold the true gain; problems' own difficulty cancels."""
    rng = np.random.default_rng(2)
    covered, widths, unpaired = 0, [], []
    for _ in range(400):
        skill = rng.uniform(0, 0.8, size=(150, 1))
        before = (rng.random((150, 4)) < skill).astype(float)
        after = (rng.random((150, 8)) < skill + 0.1).astype(float)
        centre, low, high = paired_difference(before, after)
        assert centre == pytest.approx(after.mean() - before.mean())
        covered += low <= 0.1 <= high
        widths.append(high - low)
        unpaired.append(2 * 1.96 * np.hypot(clustered_se(before), clustered_se(after)))
    assert 0.92 <= covered / 400 <= 0.98
    assert np.mean(widths) < 0.85 * np.mean(unpaired)


def test_no_change_is_no_difference():
    values = np.random.default_rng(3).random((20, 4))
    assert paired_difference(values, values) == (0.0, 0.0, 0.0)


def test_summary():
    correct = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    lengths = np.array([[10.0, 30.0], [10.0, 10.0], [20.0, 20.0]])
    formatted = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    truncated = np.array([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    surprise = np.array([[1.0, 2.0], [0.0, 0.0], [0.5, 0.5]])
    found = summarise(correct, lengths, formatted, truncated, surprise, pass_at=2)
    assert found["pass@1"] == 0.5 and found["pass@2"] == pytest.approx(2 / 3)
    assert found["se"] == pytest.approx(0.5 / np.sqrt(3))
    assert found["mean_length"] == pytest.approx(100 / 6)
    assert found["format_rate"] == pytest.approx(5 / 6)
    assert found["truncated"] == pytest.approx(1 / 6)
    assert found["entropy"] == pytest.approx((10 + 60 + 10 + 10) / 100)  # by token, not by answer
    assert "pass@2" not in summarise(correct, lengths, formatted, truncated, surprise, pass_at=None)
