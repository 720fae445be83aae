"""Metrics against brute force."""

import itertools

import numpy as np
import pytest

from h1r_rl.evaluation.metrics import clustered_se, paired_difference, pass_at_k, summarise
from h1r_rl.evaluation.report import markdown_table, stage_entry, terminal_plot, write_result


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(c, n, k) == pytest.approx(np.mean([any(d) for d in draws]))


def test_clustered_error_counts_problems_not_samples():
    rng = np.random.default_rng(0)
    skill = rng.random(4000)
    one = (rng.random((4000, 1)) < skill[:, None]).astype(float)
    copies = np.repeat(one, 8, axis=1)  # eight copies of an answer are one observation
    assert clustered_se(copies) == pytest.approx(clustered_se(one))
    assert clustered_se(one) == pytest.approx(one.std() / np.sqrt(4000), rel=1e-3)


def test_paired_difference_covers_the_truth():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        skill = rng.random((100, 1)) * 0.5
        before = (rng.random((100, 4)) < skill).astype(float)
        after = (rng.random((100, 8)) < skill + 0.3).astype(float)
        _, low, high = paired_difference(before, after)
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199


def test_result_file_has_its_shape(tmp_path):
    grid = np.array([[1.0, 0.0], [0.0, 0.0]])
    summary = summarise(grid, grid + 4, grid, grid, grid, pass_at=2)
    assert summary["pass@1"] == 0.25 and summary["pass@2"] == 0.5
    greedy = summarise(
        grid[:, :1], grid[:, :1], grid[:, :1], grid[:, :1], grid[:, :1], pass_at=None
    )
    entry = stage_entry({"greedy": greedy, "t1": summary})
    assert entry["pass@2"] == 0.5 and entry["greedy"]["pass@1"] == 0.5
    result = write_result(tmp_path, {"sft": entry}, {"sft": 1.5}, tmp_path / "model")
    assert "| sft | 50.0" in markdown_table(result)


def test_an_answer_without_a_verdict_is_not_a_wrong_one():
    correct = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    ones = np.ones((3, 2))
    summary = summarise(correct, ones, correct, ones * 0, ones, pass_at=2)
    assert summary["pass@1"] == pytest.approx((1.0 + 0.5) / 2)
    assert summary["pass@2"] == 1.0  # of the one problem with two verdicts
    assert summary["without_verdict"] == pytest.approx(0.5)


def test_terminal_plot_draws_something():
    assert "reward" in terminal_plot([0, 1, 2], [0.1, 0.5, 0.9], "reward")
