"""Counters whose size and names no verifier's free text can blow up."""

from __future__ import annotations

from mlflow.utils.validation import _validate_metric_name

from h1r_rl.records import Verdict
from rewards.registry import MAX_REASON_CHARS, checked
from rewards.reward_stats import MAX_REASONS, OTHER, RewardStats


def test_reasons_are_bounded_in_number_and_length():
    stats = RewardStats()
    stats.add("math", Verdict(1.0, {}, "correct"), 0.01)
    for n in range(10_000):
        stats.add("mine:verify", Verdict(0.0, {}, f"{n} words, expected more"), 0.01)
    stats.add("mine:verify", Verdict(0.0, {}, "x" * 1_000_000), 0.01)
    stats.add("math", Verdict(1.0, {}, "correct"), 0.01)
    metrics = stats.snapshot()
    reasons = {name: n for name, n in metrics.items() if name.startswith("reward/reason/")}
    assert len(reasons) == MAX_REASONS + 1
    assert sum(reasons.values()) == metrics["reward/verdicts"] == 10_003
    assert reasons["reward/reason/correct"] == 2
    assert reasons[f"reward/reason/{OTHER}"] == 10_003 - 2 - (MAX_REASONS - 1)
    assert max(map(len, metrics)) <= 250


def test_any_reason_is_a_name_that_the_tracker_takes():
    stats = RewardStats()
    for reason in ("", " ", "..", "a/../b", "/", "50% of x\n", "é\ud800\0", "bad_ground_truth:no"):
        stats.add("mine:verify", Verdict(None, {}, reason), 0.01)
    for name in stats.snapshot():
        _validate_metric_name(name)
    assert stats.snapshot()["reward/reason/bad_ground_truth:no"] == 1


def test_a_users_reason_is_cut():
    assert checked(Verdict(1.0, {}, "x" * 1_000_000)).reason == "x" * MAX_REASON_CHARS
    assert checked(Verdict(1.0, {}, "fine")).reason == "fine"
